"""The engine that is asked nothing: it stands for one whose answers were kept."""

from collections.abc import Iterator, Sequence

from align.engines.engine import ChoiceRequest, ChoiceScores, Completed, EngineIdentity, Progress, Request, unheard


class RecordedEngine:
    """Has the name of the engine that gave the answers, and no answer of its own."""

    depends_on_batch = False
    choice_method = "repeated from opinions.jsonl"

    def __init__(self, name: str) -> None:
        self.name = name

    def identity(self) -> EngineIdentity:
        return EngineIdentity("recorded", self.name)

    def complete(
        self, requests: Sequence[Request], progress: Progress = unheard, at_once: int | None = None
    ) -> Iterator[Completed]:
        raise NotImplementedError("answers that were kept are read, not asked for")

    def choice_logprobs(
        self, requests: Sequence[ChoiceRequest], progress: Progress = unheard
    ) -> Iterator[ChoiceScores]:
        raise NotImplementedError("answers that were kept are read, not asked for")
