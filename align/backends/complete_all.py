"""Answer many requests so that a kill costs one chunk, and neither kills nor the number of processes change a result.

Requests are put into a fixed order and cut into fixed chunks. A chunk is the unit of determinism, since a row's last
bits may depend on the rows it shared a batch with: a chunk with any row missing from the journal is run whole again.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from align import processes
from align.artefacts import Journal
from align.errors import AlignError
from align.generation import Backend, ChoiceRequest, ChoiceScores, Completed, Request

Asked = TypeVar("Asked", Request, ChoiceRequest)


def complete_all(
    backend: Backend, requests: Sequence[Request], batch_size: int, journal_path: Path | None, description: str
) -> dict[str, Completed]:
    """Every request's completion by id, in every process.

    Args:
        batch_size: requests a chunk.
        journal_path: finished rows are kept in `journal_path.<rank>`, and those found there are not made again. None
            keeps nothing, and each process answers all by itself.
        description: what the progress bar says.

    Raises:
        AlignError: the backend left a request unanswered.
    """
    rows = _answer_all(backend.complete, requests, batch_size, journal_path, description)
    return {row_id: Completed(**row) for row_id, row in rows.items()}


def score_all(
    backend: Backend, requests: Sequence[ChoiceRequest], batch_size: int, journal_path: Path | None, description: str
) -> dict[str, ChoiceScores]:
    """`complete_all` for the log-probabilities of choices."""
    rows = _answer_all(backend.choice_logprobs, requests, batch_size, journal_path, description)
    return {row_id: ChoiceScores(row_id, tuple(row["logprobs"]), tuple(row["tokens"])) for row_id, row in rows.items()}


def _answer_all(
    answer: Callable[[Sequence[Asked]], Iterable[Completed | ChoiceScores]],
    requests: Sequence[Asked],
    batch_size: int,
    journal_path: Path | None,
    description: str,
) -> dict[str, dict[str, Any]]:
    if len({request.id for request in requests}) < len(requests):
        raise ValueError(f"{description}: two requests have the same id")
    # Longest first: little padding inside a chunk, and what does not fit in memory shows at once.
    ordered = sorted(requests, key=lambda request: (-_characters(request), request.id))
    chunks = [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]
    rows: dict[str, dict[str, Any]] = {}
    if journal_path is None:
        _answer_chunks(answer, chunks, rows.__contains__, lambda row: rows.update({row["id"]: row}), description)
    else:
        with Journal(journal_path, processes.rank()) as journal:
            _answer_chunks(answer, processes.share(chunks), journal.__contains__, journal.append, description)
        processes.barrier()
        with Journal(journal_path, processes.rank()) as journal:
            rows = journal.rows
    unanswered = [request.id for request in requests if request.id not in rows]
    if unanswered:
        raise AlignError(f"{description}: the engine left {len(unanswered)} requests unanswered, first {unanswered[0]}")
    return {request.id: rows[request.id] for request in requests}


def _answer_chunks(
    answer: Callable[[Sequence[Asked]], Iterable[Completed | ChoiceScores]],
    chunks: Sequence[Sequence[Asked]],
    is_answered: Callable[[str], bool],
    keep: Callable[[dict[str, Any]], None],
    description: str,
) -> None:
    todo = [chunk for chunk in chunks if any(not is_answered(request.id) for request in chunk)]
    total, left = (sum(len(chunk) for chunk in some) for some in (chunks, todo))
    with tqdm(total=total, initial=total - left, desc=description, disable=not processes.is_first()) as progress:
        for chunk in todo:
            for answered in answer(chunk):
                keep(dataclasses.asdict(answered))
                progress.update()


def _characters(request: Request | ChoiceRequest) -> int:
    choices = request.choices if isinstance(request, ChoiceRequest) else ()
    return sum(len(message.content) for message in request.messages) + sum(len(choice) for choice in choices)
