"""The engine that runs a causal language model in this process."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import torch

from align.data.chat import prompt_ids, token_ids
from align.decoding.continuous_batching import ContinuousBatcher, Task
from align.decoding.decode import decode
from align.decoding.prefix_trees import Continuation, can_score_trees, tree_batches, tree_logprobs
from align.decoding.shared_prefixes import can_share_prefixes
from align.engines.engine import ChoiceRequest, ChoiceScores, Completed, EngineIdentity, Progress, Request, unheard
from align.models.loading import stop_token_ids
from align.models.logprobs import completion_logprobs
from align.models.weights import Weights, hub_revision
from align.models.wrappers import inner_model
from align.records import FinishReason

RUNNING_ROWS = 64
"""Completions that are written at a time, where as many are asked for and the caller sets no bound."""

KEPT_TOKENS = 2**15
"""Tokens of openings and ended conversations whose keys and values are kept during a call."""

SCORED_TOKENS = 1024
"""Positions, padding included, of one scoring pass."""


@dataclass(frozen=True)
class _Choice:
    """One choice of a request: which, and the ids before it and of it."""

    request: int
    number: int
    prompt: list[int]
    choice: list[int]

    @property
    def lengths(self) -> tuple[int, int]:
        return len(self.prompt), len(self.choice)


class LocalEngine:
    """Completions and choices by a causal LM in this process.

    Requests of one call that share their sampling settings run together, as many at a time as the caller allows; one
    that ends is replaced by one that waits. Nothing is remembered from call to call, so that a call's results are a
    function of its requests alone. `read` counts the prompt tokens that completions took through the model.
    """

    depends_on_batch = True
    choice_method = "log-probabilities"

    def __init__(
        self, model: Any, tokenizer: Any, *, name: str, system_prompt: str | None = None, weights: Weights | None = None
    ) -> None:
        self.name = name
        self.weights = weights
        self.read = 0
        self._model = model
        self._tokenizer = tokenizer
        self._system_prompt = system_prompt
        self._stop_ids = stop_token_ids(model, tokenizer)

    def identity(self) -> EngineIdentity:
        """The model's name without this machine's folders, and its weights' digest where the files are known."""
        return self._identity

    @cached_property
    def _identity(self) -> EngineIdentity:
        return EngineIdentity(
            "local",
            self.name.removeprefix("local:"),
            digest=self.weights.digest() if self.weights else "",
            revision=hub_revision(self.weights.folder) if self.weights else "",
            precision=str(self._model.dtype).removeprefix("torch."),
        )

    def complete(
        self, requests: Sequence[Request], progress: Progress = unheard, at_once: int | None = None
    ) -> Iterator[Completed]:
        """Complete each request and its follow-ups, longest first; progress counts follow-ups as they come up."""
        done = 0
        for settings, group in groupby(sorted(requests, key=_settings), key=_settings):
            batch = list(group)
            answers = self._continuous if can_share_prefixes(inner_model(self._model).config) else self._together
            share = _within(progress, done, len(batch), len(requests))
            yield from answers(batch, settings, share, at_once or RUNNING_ROWS)
            done += len(batch)

    def _continuous(
        self, requests: Sequence[Request], settings: tuple[int, float, float], progress: Progress, at_once: int
    ) -> Iterator[Completed]:
        """Requests of the same settings, and their follow-ups, through a running batch."""
        running = ContinuousBatcher(
            self._model,
            rows=at_once,
            kept_tokens=KEPT_TOKENS,
            stop_ids=self._stop_ids,
            pad_id=self._tokenizer.pad_token_id,
            **_as_options(settings),
        )
        tasks = [Task(request, self._prompt(request), request.seed) for request in requests]
        waiting = deque(sorted(tasks, key=lambda task: -len(task.prompt)))
        turns = sum(2 if request.follow_up else 1 for request in requests)
        for answered, (task, tokens, reason) in enumerate(running.run(waiting), start=1):
            completed = self._completed(task.key, tokens, reason)
            if task.key.follow_up:
                request = task.key.follow_up(completed.text)
                if _settings(request) == settings:
                    waiting.appendleft(Task(request, self._prompt(request), request.seed))
            progress(min(answered / turns, 1.0))
            yield completed
        self.read += running.prefilled

    def _together(
        self, requests: Sequence[Request], settings: tuple[int, float, float], progress: Progress, at_once: int
    ) -> Iterator[Completed]:
        """Requests of the same settings as whole batches, for models whose cache rows cannot be picked from."""
        for start in range(0, len(requests), at_once):
            batch = requests[start : start + at_once]
            decoded = decode(
                self._model,
                [self._prompt(request) for request in batch],
                seeds=[request.seed for request in batch],
                stop_ids=self._stop_ids,
                pad_id=self._tokenizer.pad_token_id,
                progress=_within(progress, start, len(batch), len(requests)),
                **_as_options(settings),
            )
            for request, tokens, reason in zip(batch, decoded.tokens, decoded.finish_reasons, strict=True):
                yield self._completed(request, tokens, reason)

    def _completed(self, request: Request, tokens: list[int], reason: FinishReason) -> Completed:
        words = tokens[:-1] if reason == "stop" else tokens
        return Completed(request.id, self._tokenizer.decode(words, skip_special_tokens=True), reason, len(tokens))

    def choice_logprobs(
        self, requests: Sequence[ChoiceRequest], progress: Progress = unheard
    ) -> Iterator[ChoiceScores]:
        """Score each request's choices once: the choice's tokens alone, not the end of the turn."""
        choices = [
            _Choice(index, number, prompt, token_ids(self._tokenizer, text))
            for index, request in enumerate(requests)
            for prompt in [self._prompt(request)]
            for number, text in enumerate(request.choices)
        ]
        sums = {(choice.request, choice.number): 0.0 for choice in choices}
        scored = self._score_trees if can_score_trees(self._model) else self._score_rows
        done = 0
        for batch, logprobs in scored([choice for choice in choices if choice.choice]):
            for choice, logprob in zip(batch, logprobs, strict=True):
                sums[choice.request, choice.number] = logprob
            done += len(batch)
            progress(done / len(choices))
        lengths = {(choice.request, choice.number): len(choice.choice) for choice in choices}
        for index, request in enumerate(requests):
            keys = [(index, number) for number in range(len(request.choices))]
            yield ChoiceScores(request.id, tuple(sums[key] for key in keys), tuple(lengths[key] for key in keys))

    def _score_trees(self, choices: Sequence[_Choice]) -> Iterator[tuple[list[_Choice], list[float]]]:
        """Batches and their scores; what choices have before them in common is read once a batch."""
        continuations = [Continuation(choice.prompt, choice.choice) for choice in choices]
        for batch in tree_batches(continuations, SCORED_TOKENS):
            logprobs = tree_logprobs(self._model, [continuations[index] for index in batch])
            yield [choices[index] for index in batch], logprobs

    def _score_rows(self, choices: Sequence[_Choice]) -> Iterator[tuple[list[_Choice], list[float]]]:
        """The same by a row for each choice, for models that take no tree."""
        for batch in _batches(choices):
            yield batch, self._score(batch)

    def _score(self, batch: Sequence[_Choice]) -> list[float]:
        """Sum of each choice's token log-probabilities."""
        before, after = (max(lengths) for lengths in zip(*(choice.lengths for choice in batch), strict=True))
        ids = torch.full((len(batch), before + after), self._tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, choice in enumerate(batch):
            start, end = before - len(choice.prompt), before + len(choice.choice)
            ids[row, start:end] = torch.tensor(choice.prompt + choice.choice)
            mask[row, start:end] = 1
        device = self._model.device
        with torch.no_grad():
            logprobs = completion_logprobs(self._model, ids.to(device), mask.to(device), after).logprobs
        return (logprobs * mask[:, before:].to(device)).sum(-1).tolist()

    def _prompt(self, request: Request | ChoiceRequest) -> list[int]:
        return prompt_ids(self._tokenizer, request.messages, self._system_prompt, request.prefill)


def _within(progress: Progress, before: int, rows: int, of: int) -> Progress:
    """Progress of some rows of many, told as that of all."""
    return lambda share: progress((before + share * rows) / of)


def _as_options(settings: tuple[int, float, float]) -> dict[str, Any]:
    return dict(zip(("max_new_tokens", "temperature", "top_p"), settings, strict=True))


def _settings(request: Request) -> tuple[int, float, float]:
    return request.max_new_tokens, request.temperature, request.top_p


def _batches(choices: Sequence[_Choice]) -> Iterator[list[_Choice]]:
    """Choices of like lengths together, `SCORED_TOKENS` positions at a time."""
    batch: list[_Choice] = []
    for choice in sorted(choices, key=lambda choice: choice.lengths):
        wider = [*batch, choice]
        width = sum(max(lengths) for lengths in zip(*(each.lengths for each in wider), strict=True))
        if batch and width * len(wider) > SCORED_TOKENS:
            yield batch
            wider = [choice]
        batch = wider
    if batch:
        yield batch
