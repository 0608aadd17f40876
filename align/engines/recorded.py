"""The engine that stands for one whose answers were recorded; it is never asked anything."""

from collections.abc import Iterator, Sequence

from align.engines.engine import ChoiceRequest, ChoiceScores, Completed, EngineIdentity, Progress, Request, no_progress


class RecordedEngine:
    """Has the name of the engine that gave the recorded answers, and gives none itself."""

    depends_on_batch = False
    choice_method = "repeated from opinions.jsonl"

    def __init__(self, name: str) -> None:
        self.name = name

    def identity(self) -> EngineIdentity:
        return EngineIdentity("recorded", self.name)

    def complete(
        self, requests: Sequence[Request], progress: Progress = no_progress, at_once: int | None = None
    ) -> Iterator[Completed]:
        raise NotImplementedError("recorded answers are read from their file, not requested")

    def choice_logprobs(
        self, requests: Sequence[ChoiceRequest], progress: Progress = no_progress
    ) -> Iterator[ChoiceScores]:
        raise NotImplementedError("recorded answers are read from their file, not requested")
