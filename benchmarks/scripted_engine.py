"""An engine that computes its answers from the request: for tests, and for trying out a stage by hand."""

from collections.abc import Callable, Iterator, Sequence

from align.engines.engine import ChoiceRequest, ChoiceScores, Completed, EngineIdentity, Progress, Request, no_progress
from align.errors import InputError


class ScriptedEngine:
    """Completes requests with `text` and scores each choice with `logprob`.

    One word counts as one token. A text longer than the request's `max_new_tokens` is truncated, with the finish reason
    'length'. `completed` and `scored` count the requests answered.
    """

    depends_on_batch = False
    choice_method = "log-probabilities"

    def __init__(
        self,
        text: Callable[[Request], str],
        logprob: Callable[[ChoiceRequest, str], float] | None = None,
        name: str = "scripted",
    ) -> None:
        self.name = name
        self.completed = 0
        self.scored = 0
        self._text = text
        self._logprob = logprob

    def identity(self) -> EngineIdentity:
        return EngineIdentity("scripted", self.name)

    def complete(
        self, requests: Sequence[Request], progress: Progress = no_progress, at_once: int | None = None
    ) -> Iterator[Completed]:
        for request in requests:
            self.completed += 1
            text = self._text(request)
            words = text.split()
            if len(words) < request.max_new_tokens:
                yield Completed(request.id, text, "stop", len(words) + 1)
            else:
                kept = words[: request.max_new_tokens]
                yield Completed(request.id, " ".join(kept), "length", len(kept))

    def choice_logprobs(
        self, requests: Sequence[ChoiceRequest], progress: Progress = no_progress
    ) -> Iterator[ChoiceScores]:
        if self._logprob is None:
            raise InputError(f"engine {self.name}: gives no log-probabilities; use another engine for this judge")
        for request in requests:
            self.scored += 1
            logprobs = tuple(self._logprob(request, choice) for choice in request.choices)
            yield ChoiceScores(request.id, logprobs, tuple(len(choice.split()) for choice in request.choices))
