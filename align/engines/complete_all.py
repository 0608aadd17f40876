"""Answer many requests so that a kill costs one chunk, and neither kills nor the number of processes change a result.

Requests are put into a fixed order and cut into fixed chunks. A chunk is the unit of determinism, since a row's last
bits may depend on the rows it shared a batch with: a chunk with any row missing from the journal is run whole again. A
chunk is several batches long where there is enough to do, as the engine fills places that come free within it alone.
An engine whose rows do not depend on each other, a server, gets all the missing rows in one call, and bounds by itself
how many are under way.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

from align.engines.engine import ChoiceRequest, ChoiceScores, Completed, Engine, Progress, Request
from align.errors import AlignError
from align.run import processes
from align.run.artefacts import Journal
from align.run.progress import RowBar

Asked = TypeVar("Asked", Request, ChoiceRequest)

MOST_BATCHES = 8
"""Batches of a chunk: what a kill may cost."""

LEAST_CHUNKS = 4
"""Chunks of work that is a few batches long, so that processes can share it."""


def complete_all(
    engine: Engine, requests: Sequence[Request], batch_size: int, journal_path: Path | None, description: str
) -> dict[str, Completed]:
    """Every request's completion, and its follow-up's, by id, in every process.

    Args:
        batch_size: requests that an engine in this process answers at a time; servers have a bound of their own.
        journal_path: finished rows are kept in `journal_path.<rank>`, and those found there are not made again. None
            keeps nothing, and each process answers all by itself.
        description: what the progress bar says.

    Raises:
        AlignError: the engine left a request unanswered.
    """
    answer = partial(engine.complete, at_once=batch_size)
    work = _Work(answer, engine.depends_on_batch, batch_size, description, _completed)
    rows: dict[str, dict[str, Any]] = {}
    asked = list(requests)
    while asked:
        rows |= _answer_all(work, asked, journal_path)
        next_turns = [request.follow_up(rows[request.id]["text"]) for request in asked if request.follow_up]
        asked = [request for request in next_turns if request.id not in rows]
    return {row_id: _completed(row) for row_id, row in rows.items()}


def score_all(
    engine: Engine, requests: Sequence[ChoiceRequest], batch_size: int, journal_path: Path | None, description: str
) -> dict[str, ChoiceScores]:
    """`complete_all` for the log-probabilities of choices."""
    work = _Work(engine.choice_logprobs, engine.depends_on_batch, batch_size, description, _scores)
    rows = _answer_all(work, requests, journal_path)
    return {row_id: _scores(row) for row_id, row in rows.items()}


def _completed(row: Mapping[str, Any]) -> Completed:
    return Completed(**row)


def _scores(row: Mapping[str, Any]) -> ChoiceScores:
    return ChoiceScores(row["id"], tuple(row["logprobs"]), tuple(row["tokens"]))


@dataclass(frozen=True)
class _Work(Generic[Asked]):
    """How requests are answered, in what chunks, and how a kept answer is read."""

    answer: Callable[[Sequence[Asked], Progress], Iterable[Completed | ChoiceScores]]
    depends_on_batch: bool
    batch_size: int
    description: str
    read: Callable[[Mapping[str, Any]], object]

    def answers(self, chunk: Sequence[Asked]) -> int:
        """How many answers a chunk is expected to give."""
        following = sum(isinstance(request, Request) and request.follow_up is not None for request in chunk)
        return len(chunk) + (following if self.depends_on_batch else 0)


def _answer_all(work: _Work[Asked], requests: Sequence[Asked], journal_path: Path | None) -> dict[str, dict[str, Any]]:
    if len({request.id for request in requests}) < len(requests):
        raise ValueError(f"{work.description}: two requests have the same id")
    ordered = sorted(requests, key=_place)
    batches = -(-len(ordered) // work.batch_size)
    size = work.batch_size * max(1, min(MOST_BATCHES, batches // LEAST_CHUNKS))
    chunks = [ordered[start : start + size] for start in range(0, len(ordered), size)]
    rows: dict[str, dict[str, Any]] = {}
    if journal_path is None:
        _answer_chunks(work, chunks, rows.get, lambda row: rows.update({row["id"]: row}))
    else:
        with Journal(journal_path, processes.rank(), work.read) as journal:
            _answer_chunks(work, processes.shard(chunks), journal.rows.get, journal.append)
            rows = journal.rows
        processes.barrier()
        if processes.world_size() > 1:
            with Journal(journal_path, processes.rank(), work.read) as journal:
                rows = journal.rows
    unanswered = [request.id for request in requests if request.id not in rows]
    if unanswered:
        raise AlignError(
            f"{work.description}: the engine left {len(unanswered)} requests unanswered, first {unanswered[0]}"
        )
    turns = [turn.id for request in requests for turn in _turns(request, rows.get)]
    return {row_id: rows[row_id] for row_id in turns if row_id in rows}


def _turns(
    request: Request | ChoiceRequest, answer_to: Callable[[str], dict[str, Any] | None]
) -> Iterator[Request | ChoiceRequest]:
    """The request, and its follow-ups as far as answers to those before are there."""
    yield request
    answered = answer_to(request.id)
    if isinstance(request, Request) and request.follow_up and answered is not None:
        yield from _turns(request.follow_up(answered["text"]), answer_to)


def _answer_chunks(
    work: _Work[Asked],
    chunks: Sequence[Sequence[Asked]],
    answer_to: Callable[[str], dict[str, Any] | None],
    keep: Callable[[dict[str, Any]], None],
) -> None:
    def is_answered(request: Asked) -> bool:
        # An engine whose rows depend on each other makes a chunk's follow-ups with it, so they are part of the chunk.
        turns = _turns(request, answer_to) if work.depends_on_batch else [request]
        return all(answer_to(turn.id) is not None for turn in turns)

    missing = [[request for request in chunk if not is_answered(request)] for chunk in chunks]
    todo = [
        chunk if work.depends_on_batch else unanswered
        for chunk, unanswered in zip(chunks, missing, strict=True)
        if unanswered
    ]
    total, left = (sum(map(work.answers, some)) for some in (chunks, todo))
    if todo and not work.depends_on_batch:
        todo = [[request for chunk in todo for request in chunk]]
    with RowBar(total, total - left, work.description) as bar:
        for chunk in todo:
            bar.begin(work.answers(chunk))
            for answered in work.answer(chunk, bar.part):
                keep(dataclasses.asdict(answered))
                bar.row()


def _place(request: Request | ChoiceRequest) -> tuple[Any, ...]:
    """Longest first: little padding, and what does not fit in memory shows at once. Choices that begin alike together:
    what they have in common is read once."""
    texts = [message.content for message in request.messages]
    return (texts if isinstance(request, ChoiceRequest) else -sum(map(len, texts)), request.id)
