"""An engine made of two functions, for tests: it counts what it was asked and can be made to die."""

import math
from collections.abc import Callable, Iterator, Sequence

from align.engines.engine import ChoiceRequest, ChoiceScores, Completed, Progress, Request, no_progress


class Engine:
    """Answers with `answer(request)`, scores each choice with `score(request, choice)` nats."""

    name = "engine"
    depends_on_batch = True
    choice_method = "log-probabilities"

    def __init__(
        self,
        answer: Callable[[Request], str | Completed] = lambda request: "",
        score: Callable[[ChoiceRequest, str], float] = lambda request, choice: 0.0,
        dies_after: float = math.inf,
    ) -> None:
        self.answer = answer
        self.score = score
        self.left = dies_after
        self.batches: list[list[str]] = []
        self.requests: list[Request] = []
        self.choices: list[ChoiceRequest] = []

    def complete(
        self, requests: Sequence[Request], progress: Progress = no_progress, at_once: int | None = None
    ) -> Iterator[Completed]:
        self.batches.append([request.id for request in requests])
        for request in requests:
            self._live()
            self.requests.append(request)
            made = self.answer(request)
            yield made if isinstance(made, Completed) else Completed(request.id, made, "stop", len(made.split()) + 1)

    def choice_logprobs(
        self, requests: Sequence[ChoiceRequest], progress: Progress = no_progress
    ) -> Iterator[ChoiceScores]:
        self.batches.append([request.id for request in requests])
        for request in requests:
            self._live()
            self.choices.append(request)
            scores = tuple(self.score(request, choice) for choice in request.choices)
            yield ChoiceScores(request.id, scores, tuple(len(choice.split()) for choice in request.choices))

    def _live(self) -> None:
        if self.left <= 0:
            raise KeyboardInterrupt
        self.left -= 1
