"""The engine that asks nobody: it repeats what a judge's engine answered before."""

from collections.abc import Iterable, Iterator, Sequence

from align.errors import InputError
from align.generation import ChoiceRequest, ChoiceScores, Completed, EngineIdentity, Progress, Request, unheard
from align.records import FinishReason, OpinionScores


class RecordedBackend:
    """Answers from the rows of an opinions.jsonl, by the digest of what was asked.

    Args:
        name: of the engine that gave the answers.
    """

    depends_on_batch = False
    choice_method = "repeated from opinions.jsonl"

    def __init__(self, rows: Iterable[OpinionScores], name: str) -> None:
        self.name = name
        self._scores: dict[str, OpinionScores] = {}
        self._reasoning: dict[str, OpinionScores] = {}
        for row in rows:
            self._scores[row.request_id] = row
            self._reasoning[row.reasoning_id] = row

    def identity(self) -> EngineIdentity:
        return EngineIdentity("recorded", self.name)

    def complete(self, requests: Sequence[Request], progress: Progress = unheard) -> Iterator[Completed]:
        self._require(self._reasoning, requests)
        for request in requests:
            row = self._reasoning[request.id]
            end: FinishReason = "length" if row.reasoning_end == "length" else "stop"
            yield Completed(request.id, row.reasoning, end, 0)

    def choice_logprobs(
        self, requests: Sequence[ChoiceRequest], progress: Progress = unheard
    ) -> Iterator[ChoiceScores]:
        self._require(self._scores, requests)
        for request in requests:
            row = self._scores[request.id]
            logprobs = tuple(float("-inf") if logprob is None else logprob for logprob in row.logprobs)
            yield ChoiceScores(request.id, logprobs, row.tokens)

    def _require(self, known: dict[str, OpinionScores], requests: Sequence[Request | ChoiceRequest]) -> None:
        missing = sum(request.id not in known for request in requests)
        if missing:
            raise InputError(
                f"opinions.jsonl: {missing} of {len(requests)} questions that these labels need were never asked: a "
                "principle is new or its words have changed, another one was drawn, or the judge's kind or examples "
                "are others; run `compare` with these settings"
            )
