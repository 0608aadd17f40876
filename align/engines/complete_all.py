"""Answers many requests so that a killed run loses at most one chunk, and resumes with the same results.

Requests are sorted into a fixed order and split into fixed chunks, which the processes share. A row's last bits may
depend on the rest of its batch, so the chunk is the unit of determinism: if the journal lacks any row of a chunk, the
whole chunk is run again. The engine refills freed batch slots only from the same chunk, so a chunk is several batches
long where there are enough requests. An engine whose rows are independent (a server) gets all missing requests in one
call and limits its concurrency itself.
"""

import dataclasses
import sys
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

Rows = dict[str, dict[str, Any]]
RequestT = TypeVar("RequestT", Request, ChoiceRequest)

MAX_BATCHES_PER_CHUNK = 8
"""Bounds the work that a kill can lose."""

MIN_CHUNKS = 4
"""Work that is at least this many batches long is split into at least this many chunks, for the processes to share."""


def complete_all(
    engine: Engine, requests: Sequence[Request], batch_size: int, journal_path: Path | None, description: str
) -> dict[str, Completed]:
    """The completions of all requests and their follow-ups, by id, in every process.

    Args:
        batch_size: requests that a local engine works on together; servers have their own limit.
        journal_path: finished rows are kept in `journal_path.<rank>` and reused from there. With None nothing is kept,
            and each process answers all requests itself.
        description: the label of the progress bar.

    Raises:
        AlignError: the engine left a request unanswered.
    """
    answer = partial(engine.complete, at_once=batch_size)
    work = _Work(answer, engine.depends_on_batch, batch_size, description, _completed)
    rows: Rows = {}
    pending = list(requests)
    while pending:
        rows |= _answer_all(work, pending, journal_path)
        turns = [(rows[each.id], each.follow_up(rows[each.id]["text"])) for each in pending if each.follow_up]
        # What would follow a refused turn counts as refused too, and is not asked.
        rows |= {turn.id: {**before, "id": turn.id} for before, turn in turns if before.get("refused")}
        pending = [turn for _, turn in turns if turn.id not in rows]
    _tell_refused(rows, description)
    return {row_id: _completed(row) for row_id, row in rows.items()}


def score_all(
    engine: Engine, requests: Sequence[ChoiceRequest], batch_size: int, journal_path: Path | None, description: str
) -> dict[str, ChoiceScores]:
    """Like `complete_all`, for the log-probabilities of choices."""
    work = _Work(engine.choice_logprobs, engine.depends_on_batch, batch_size, description, _scores)
    rows = _answer_all(work, requests, journal_path)
    _tell_refused(rows, description)
    return {row_id: _scores(row) for row_id, row in rows.items()}


def _tell_refused(rows: Rows, description: str) -> None:
    """Say how many requests a server refused, and which was the first."""
    refused = [row for row in rows.values() if row.get("refused")]
    if refused and processes.is_first():
        print(
            f"{description}: the server refused {len(refused)} of {len(rows)} requests, which are left out; "
            f"{refused[0]['id']}: {refused[0]['refused']}",
            file=sys.stderr,
            flush=True,
        )


def _completed(row: Mapping[str, Any]) -> Completed:
    return Completed(**{**row, "token_ids": tuple(row.get("token_ids", ()))})


def _scores(row: Mapping[str, Any]) -> ChoiceScores:
    return ChoiceScores(row["id"], tuple(row["logprobs"]), tuple(row["tokens"]), row.get("refused", ""))


@dataclass(frozen=True)
class _Work(Generic[RequestT]):
    """How requests are answered and chunked, and how an answer is read back from the journal."""

    answer: Callable[[Sequence[RequestT], Progress], Iterable[Completed | ChoiceScores]]
    depends_on_batch: bool
    batch_size: int
    description: str
    read: Callable[[Mapping[str, Any]], object]

    def answers(self, chunk: Sequence[RequestT]) -> int:
        """How many answers a chunk is expected to give."""
        follow_ups = sum(isinstance(request, Request) and request.follow_up is not None for request in chunk)
        return len(chunk) + (follow_ups if self.depends_on_batch else 0)


def _answer_all(work: _Work[RequestT], requests: Sequence[RequestT], journal_path: Path | None) -> Rows:
    if len({request.id for request in requests}) < len(requests):
        raise ValueError(f"{work.description}: two requests have the same id")
    ordered = sorted(requests, key=_sort_key)
    batches = -(-len(ordered) // work.batch_size)
    size = work.batch_size * max(1, min(MAX_BATCHES_PER_CHUNK, batches // MIN_CHUNKS))
    chunks = [ordered[start : start + size] for start in range(0, len(ordered), size)]
    rows: Rows = {}
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
    """The request and those of its follow-ups whose preceding turn is answered."""
    yield request
    answered = answer_to(request.id)
    if isinstance(request, Request) and request.follow_up and answered is not None:
        yield from _turns(request.follow_up(answered["text"]), answer_to)


def _answer_chunks(
    work: _Work[RequestT],
    chunks: Sequence[Sequence[RequestT]],
    answer_to: Callable[[str], dict[str, Any] | None],
    keep: Callable[[dict[str, Any]], None],
) -> None:
    def is_answered(request: RequestT) -> bool:
        # Where rows depend on their batch, a chunk's follow-ups are answered with it, so they belong to the chunk.
        turns = _turns(request, answer_to) if work.depends_on_batch else [request]
        return all(answer_to(turn.id) is not None for turn in turns)

    missing = [[request for request in chunk if not is_answered(request)] for chunk in chunks]
    todo = [
        chunk if work.depends_on_batch else unanswered
        for chunk, unanswered in zip(chunks, missing, strict=True)
        if unanswered
    ]
    total, remaining = (sum(map(work.answers, some)) for some in (chunks, todo))
    if todo and not work.depends_on_batch:
        todo = [[request for chunk in todo for request in chunk]]
    with RowBar(total, total - remaining, work.description) as bar:
        for chunk in todo:
            bar.begin(work.answers(chunk))
            for answered in work.answer(chunk, bar.part):
                keep(dataclasses.asdict(answered))
                bar.row()


def _sort_key(request: Request | ChoiceRequest) -> tuple[Any, ...]:
    """Completions longest first: there is little padding, and running out of memory shows at once. Choices by their
    text: requests with a common prefix come together, so that the prefix is prefilled once."""
    texts = [message.content for message in request.messages]
    return (texts if isinstance(request, ChoiceRequest) else -sum(map(len, texts)), request.id)
