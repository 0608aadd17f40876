"""The engine that runs a causal language model in this process."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

from align.data.chat import prompt_ids, token_ids
from align.generation import ChoiceRequest, ChoiceScores, Completed, Progress, Request, unheard
from align.models.decode import decode
from align.models.logprobs import completion_logprobs
from align.models.policy import stop_token_ids

SCORED_TOKENS = 4096
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


class LocalBackend:
    """Completions and choices by a causal LM in this process.

    The requests of one call are one batch wherever they share their sampling settings: the caller cuts its work into
    calls of the size that memory allows.
    """

    depends_on_batch = True
    choice_method = "log-probabilities"

    def __init__(self, model: Any, tokenizer: Any, *, name: str, system_prompt: str | None = None) -> None:
        self.name = name
        self._model = model
        self._tokenizer = tokenizer
        self._system_prompt = system_prompt
        self._stop_ids = stop_token_ids(model, tokenizer)

    def complete(self, requests: Sequence[Request], progress: Progress = unheard) -> Iterator[Completed]:
        """Complete each request once. Progress is told after each token: rows come when all of a batch have ended."""
        done = 0
        for _, group in groupby(sorted(requests, key=_settings), key=_settings):
            batch = list(group)
            yield from self._complete_batch(batch, _within(progress, done, len(batch), len(requests)))
            done += len(batch)

    def _complete_batch(self, requests: Sequence[Request], progress: Progress) -> Iterator[Completed]:
        max_new_tokens, temperature, top_p = _settings(requests[0])
        decoded = decode(
            self._model,
            [self._prompt(request) for request in requests],
            seeds=[request.seed for request in requests],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            stop_ids=self._stop_ids,
            pad_id=self._tokenizer.pad_token_id,
            progress=progress,
        )
        for request, tokens, reason in zip(requests, decoded.tokens, decoded.finish_reasons, strict=True):
            words = tokens[:-1] if reason == "stop" else tokens
            text = self._tokenizer.decode(words, skip_special_tokens=True)
            yield Completed(request.id, text, reason, len(tokens))

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
        done = 0
        for batch in _batches([choice for choice in choices if choice.choice]):
            for choice, logprob in zip(batch, self._score(batch), strict=True):
                sums[choice.request, choice.number] = logprob
            done += len(batch)
            progress(done / len(choices))
        lengths = {(choice.request, choice.number): len(choice.choice) for choice in choices}
        for index, request in enumerate(requests):
            keys = [(index, number) for number in range(len(request.choices))]
            yield ChoiceScores(request.id, tuple(sums[key] for key in keys), tuple(lengths[key] for key in keys))

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
