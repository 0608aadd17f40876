"""An engine whose answers are functions of the request: for tests, and for anyone who wants to try a stage by hand."""

from collections.abc import Callable, Iterator, Sequence

from align.engines.engine import ChoiceRequest, ChoiceScores, Completed, EngineIdentity, Progress, Request, unheard
from align.errors import InputError


class ScriptedEngine:
    """Answers by `text`, and scores by `logprob`, one choice at a time.

    A text counts one token a word, and a choice too; a text longer than the request's `max_new_tokens` is cut there,
    with finish reason 'length'. `completed` and `scored` count the requests answered.
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
        self, requests: Sequence[Request], progress: Progress = unheard, at_once: int | None = None
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
        self, requests: Sequence[ChoiceRequest], progress: Progress = unheard
    ) -> Iterator[ChoiceScores]:
        if self._logprob is None:
            raise InputError(f"engine {self.name}: gives no log-probabilities; use another engine for this judge")
        for request in requests:
            self.scored += 1
            logprobs = tuple(self._logprob(request, choice) for choice in request.choices)
            yield ChoiceScores(request.id, logprobs, tuple(len(choice.split()) for choice in request.choices))
