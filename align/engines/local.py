"""The engine that runs a causal language model in this process."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import torch

from align.data.answers import AnswerReader
from align.data.chat import printed_date, prompt_ids, token_ids
from align.decoding.continuous_batching import ContinuousBatcher, Task
from align.decoding.decode import decode
from align.decoding.prefix_trees import Continuation, can_score_trees, tree_batches, tree_logprobs
from align.decoding.shared_prefixes import can_share_prefixes
from align.decoding.slot_batching import ROWS_ON_GPU, SlotBatcher, can_use_slots
from align.engines.engine import ChoiceRequest, ChoiceScores, Completed, EngineIdentity, Progress, Request, no_progress
from align.models.loading import stop_token_ids
from align.models.logprobs import completion_logprobs
from align.models.positions import check_length
from align.models.weights import Weights, hub_revision
from align.models.wrappers import inner_model
from align.records import FinishReason

DEFAULT_BATCH_SIZE = 64
"""Completions that are generated together where the caller sets no limit."""

CACHED_TOKENS = 2**15
"""Tokens of shared prefixes and finished conversations whose keys and values stay cached during a call."""

SCORED_TOKENS = 1024
"""Token positions of one scoring pass, padding included."""


@dataclass(frozen=True)
class _Choice:
    """One choice: the index of its request, its index within the request, and the token ids of prompt and choice."""

    request: int
    index: int
    prompt_ids: list[int]
    choice_ids: list[int]

    @property
    def lengths(self) -> tuple[int, int]:
        return len(self.prompt_ids), len(self.choice_ids)


class LocalEngine:
    """Completes requests and scores choices with a causal LM in this process.

    Requests of one call that share their sampling settings run in one continuous batch of up to `at_once` rows. Nothing
    is cached between calls, so a call's results depend on its requests alone. `prefilled_tokens` counts the prompt
    tokens that `complete` ran through the model.
    """

    depends_on_batch = True
    choice_method = "log-probabilities"

    def __init__(
        self, model: Any, tokenizer: Any, *, name: str, system_prompt: str | None = None, weights: Weights | None = None
    ) -> None:
        self.name = name
        self.weights = weights
        self.prefilled_tokens = 0
        self._model = model
        self._tokenizer = tokenizer
        self._system_prompt = system_prompt
        self._stop_ids = stop_token_ids(model, tokenizer)
        self._answers = AnswerReader(tokenizer)

    @property
    def date(self) -> str:
        """The day that the chat template prints as today's; empty if it prints none, or each call's own."""
        return printed_date(self._tokenizer)

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self._tokenizer

    @property
    def positions(self) -> int | None:
        """The longest row, prompt and completion, that the model was made for; None where its config does not say."""
        config = self._model.config.get_text_config()
        return getattr(config, "max_position_embeddings", None)

    def identity(self) -> EngineIdentity:
        """The model's name without this machine's folders, and the digest of its weights where the files are known."""
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
        self, requests: Sequence[Request], progress: Progress = no_progress, at_once: int | None = None
    ) -> Iterator[Completed]:
        """Complete each request and its follow-ups, longest prompt first."""
        done = 0
        for settings, group in groupby(sorted(requests, key=_sampling), key=_sampling):
            batch = list(group)
            run = (
                self._run_continuously if can_share_prefixes(inner_model(self._model).config) else self._run_in_batches
            )
            part = _part_of(progress, done, len(batch), len(requests))
            yield from run(batch, settings, part, at_once or DEFAULT_BATCH_SIZE)
            done += len(batch)

    def _run_continuously(
        self, requests: Sequence[Request], settings: tuple[int, float, float], progress: Progress, at_once: int
    ) -> Iterator[Completed]:
        """Complete requests with equal sampling settings, and their follow-ups, in a continuous batch."""
        options = {"stop_ids": self._stop_ids, "pad_id": self._tokenizer.pad_token_id, **_as_options(settings)}
        batcher: Any
        if can_use_slots(self._model):
            batcher = SlotBatcher(self._model, rows=max(at_once, ROWS_ON_GPU), **options)
        else:
            batcher = ContinuousBatcher(self._model, rows=at_once, kept_tokens=CACHED_TOKENS, **options)
        tasks = [Task(request, self._prompt(request), request.seed) for request in requests]
        longest = max(len(task.prompt) for task in tasks) + settings[0]
        check_length(inner_model(self._model), longest, "shorten the prompts, or lower max_new_tokens")
        waiting = deque(sorted(tasks, key=lambda task: -len(task.prompt)))
        turns = sum(2 if request.follow_up else 1 for request in requests)
        for answered, (task, tokens, reason, *_) in enumerate(batcher.run(waiting), start=1):
            completed = self._completed(task.key, task.prompt, tokens, reason)
            if task.key.follow_up:
                request = task.key.follow_up(completed.text)
                if _sampling(request) == settings:
                    waiting.appendleft(Task(request, self._prompt(request), request.seed))
            progress(min(answered / turns, 1.0))
            yield completed
        self.prefilled_tokens += batcher.prefilled

    def _run_in_batches(
        self, requests: Sequence[Request], settings: tuple[int, float, float], progress: Progress, at_once: int
    ) -> Iterator[Completed]:
        """Complete them in static batches, for models from whose KV cache single rows cannot be selected."""
        for start in range(0, len(requests), at_once):
            batch = requests[start : start + at_once]
            prompts = [self._prompt(request) for request in batch]
            decoded = decode(
                self._model,
                prompts,
                seeds=[request.seed for request in batch],
                stop_ids=self._stop_ids,
                pad_id=self._tokenizer.pad_token_id,
                progress=_part_of(progress, start, len(batch), len(requests)),
                **_as_options(settings),
            )
            rows = zip(batch, prompts, decoded.tokens, decoded.finish_reasons, strict=True)
            yield from (self._completed(*row) for row in rows)

    def _completed(self, request: Request, prompt: Sequence[int], tokens: list[int], reason: FinishReason) -> Completed:
        answer = self._answers.read(prompt, tokens[:-1] if reason == "stop" else tokens)
        return Completed(
            request.id,
            answer.text,
            reason if answer.given else "length",
            len(tokens),
            answer.thought,
            answer.given,
            tuple(tokens) if request.keep_token_ids else (),
        )

    def choice_logprobs(
        self, requests: Sequence[ChoiceRequest], progress: Progress = no_progress
    ) -> Iterator[ChoiceScores]:
        """Score the tokens of each request's choices, without the end of the turn."""
        choices = [
            _Choice(number, index, prompt, token_ids(self._tokenizer, text))
            for number, request in enumerate(requests)
            for prompt in [self._prompt(request)]
            for index, text in enumerate(request.choices)
        ]
        sums = {(choice.request, choice.index): 0.0 for choice in choices}
        score = self._score_trees if can_score_trees(self._model) else self._score_rows
        done = 0
        for batch, logprobs in score([choice for choice in choices if choice.choice_ids]):
            for choice, logprob in zip(batch, logprobs, strict=True):
                sums[choice.request, choice.index] = logprob
            done += len(batch)
            progress(done / len(choices))
        lengths = {(choice.request, choice.index): len(choice.choice_ids) for choice in choices}
        for number, request in enumerate(requests):
            keys = [(number, index) for index in range(len(request.choices))]
            yield ChoiceScores(request.id, tuple(sums[key] for key in keys), tuple(lengths[key] for key in keys))

    def _score_trees(self, choices: Sequence[_Choice]) -> Iterator[tuple[list[_Choice], list[float]]]:
        """Batches and their scores; prefixes that choices share are prefilled once per batch."""
        continuations = [Continuation(choice.prompt_ids, choice.choice_ids) for choice in choices]
        for batch in tree_batches(continuations, SCORED_TOKENS):
            logprobs = tree_logprobs(self._model, [continuations[index] for index in batch])
            yield [choices[index] for index in batch], logprobs

    def _score_rows(self, choices: Sequence[_Choice]) -> Iterator[tuple[list[_Choice], list[float]]]:
        """The same with one row per choice, for models that do not support prefix trees."""
        for batch in _batches(choices):
            yield batch, self._score_batch(batch)

    def _score_batch(self, batch: Sequence[_Choice]) -> list[float]:
        """The sum of each choice's token log-probabilities."""
        before, after = (max(lengths) for lengths in zip(*(choice.lengths for choice in batch), strict=True))
        ids = torch.full((len(batch), before + after), self._tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, choice in enumerate(batch):
            start, end = before - len(choice.prompt_ids), before + len(choice.choice_ids)
            ids[row, start:end] = torch.tensor(choice.prompt_ids + choice.choice_ids)
            mask[row, start:end] = 1
        device = self._model.device
        with torch.no_grad():
            logprobs = completion_logprobs(self._model, ids.to(device), mask.to(device), after).logprobs
        return (logprobs * mask[:, before:].to(device)).sum(-1).tolist()

    def _prompt(self, request: Request | ChoiceRequest) -> list[int]:
        return prompt_ids(self._tokenizer, request.messages, self._system_prompt, request.prefill)


def _part_of(progress: Progress, done: int, rows: int, total: int) -> Progress:
    """A `Progress` for `rows` of `total` rows, of which `done` are finished."""
    return lambda share: progress((done + share * rows) / total)


def _as_options(settings: tuple[int, float, float]) -> dict[str, Any]:
    return dict(zip(("max_new_tokens", "temperature", "top_p"), settings, strict=True))


def _sampling(request: Request) -> tuple[int, float, float]:
    return request.max_new_tokens, request.temperature, request.top_p


def _batches(choices: Sequence[_Choice]) -> Iterator[list[_Choice]]:
    """Batches of choices of similar lengths, of at most `SCORED_TOKENS` positions each."""
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
