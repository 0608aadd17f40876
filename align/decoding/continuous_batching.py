"""Continuous batching: as soon as a completion ends, a waiting prompt takes its place in the batch.

A prompt that begins like a shared prefix or an earlier conversation copies those tokens' states instead of computing
them. A prefix that all prompts share is stored once for all rows.

Shapes: R rows, V vocabulary.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from align.decoding.batch_cache import BatchCache
from align.decoding.cache import reserved_cache
from align.decoding.prefill import PrefillRow, prefill, prefill_positions
from align.decoding.prefix_cache import CachedPrefix, PrefixCache
from align.decoding.sampling import most_likely, sample, uniform_numbers
from align.decoding.shared_prefix_attention import MIN_PREFIX_TOKENS, attending_to_prefix, can_attend_to_prefix
from align.decoding.shared_prefixes import find_shared_prefixes
from align.models.wrappers import eval_mode, inner_model, without_ddp
from align.records import FinishReason

ADMIT_SHARE = 1 / 16
"""Waiting tasks are admitted once this share of the rows is free. Each admission is a pass that reads all weights."""

DROP_SHARE = 1 / 4
"""With no task waiting, finished rows are dropped once they make up this share. Each time, the cache is copied."""

PREFILL_POSITIONS = 4096
"""The most positions of one prefill pass, padding and cached tokens included."""


@dataclass(frozen=True)
class Task:
    """A prompt to complete. `key` identifies it to the caller."""

    key: Any
    prompt: Sequence[int]
    seed: int


Finished = tuple[Task, list[int], FinishReason]


@dataclass
class _Row:
    task: Task
    prefill: PrefillRow
    uniforms: np.ndarray
    tokens: list[int] = field(default_factory=list)


class ContinuousBatcher:
    """Completes tasks with a causal LM (perhaps wrapped by PEFT or DDP), at most `rows` at a time.

    `kept_tokens` is the capacity of the prefix cache, which holds shared prefixes and finished conversations. A task
    whose prompt continues one of them only runs its new tokens through the model. `prefilled` counts the prompt tokens
    that have run through the model.
    """

    def __init__(
        self,
        model: Any,
        *,
        rows: int,
        kept_tokens: int,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        stop_ids: Sequence[int],
        pad_id: int,
    ) -> None:
        self.prefilled = 0
        self._model = without_ddp(model)
        inner = inner_model(model)
        self._config, self._device = inner.config, inner.device
        self._limit, self._temperature, self._top_p = max_new_tokens, temperature, top_p
        self._stops, self._pad_id = frozenset(stop_ids), pad_id
        self._prefix_cache = PrefixCache(kept_tokens)
        self._shared_prefix: CachedPrefix | None = None
        self._max_rows = rows
        self._rows: list[_Row | None] = []
        self._batch_cache = BatchCache(self._config, 2 * max_new_tokens, self._device)
        self._last_tokens = torch.zeros(0, dtype=torch.long, device=self._device)

    def run(self, waiting: deque[Task]) -> Iterator[Finished]:
        """Complete all waiting tasks, in their order. Tokens include the stop token.

        After any result the caller may add tasks to `waiting`, such as the next turn of a conversation: they are
        admitted at once.
        """
        self._prefill_shared_prefixes([task.prompt for task in waiting])
        self._rows += [None] * (min(self._max_rows, len(waiting)) - len(self._rows))
        while waiting or any(self._rows):
            yield from self._admit(waiting)
            if not waiting:
                self._drop_finished()
            if any(self._rows):
                yield from self._step()

    def _prefill_shared_prefixes(self, prompts: Sequence[Sequence[int]]) -> None:
        """Encode the prefixes that prompts share, and cache them."""
        prefixes = find_shared_prefixes(prompts).ids if len(prompts) > 1 else []
        for ids in filter(None, prefixes):
            cache = reserved_cache(self._config, len(ids))
            self._forward(torch.tensor([ids], device=self._device), past_key_values=cache, logits_to_keep=1)
            self.prefilled += len(ids)
            prefix = CachedPrefix(tuple(ids), [(layer.keys[0], layer.values[0]) for layer in cache.layers])
            self._prefix_cache.add(prefix)
            if len(prefixes) == 1 and len(ids) >= MIN_PREFIX_TOKENS and can_attend_to_prefix(self._model, prefix):
                self._shared_prefix = prefix

    @property
    def _free(self) -> int:
        return self._max_rows - sum(row is not None for row in self._rows)

    def _admit(self, waiting: deque[Task]) -> Iterator[Finished]:
        """Fill free rows with waiting tasks, in prefill passes of a limited size."""
        if self._free < max(1, ADMIT_SHARE * self._max_rows):
            return
        while waiting and self._free:
            rows = self._next_rows(waiting)
            prefix_lengths = [self._shared_length(row.task.prompt) for row in rows]
            widths = [len(row.task.prompt) - length for row, length in zip(rows, prefix_lengths, strict=True)]
            slots = self._free_slots(len(rows), max(widths))
            new = prefill(self._forward, self._config, [row.prefill for row in rows], self._pad_id, self._device)
            for number, (slot, row) in enumerate(zip(slots, rows, strict=True)):
                self._batch_cache.write_row(slot, new.cache, number, new.columns[number], prefix_lengths[number])
                self._rows[slot] = row
                self.prefilled += len(row.prefill.uncached)
            self._trim()
            yield from self._sample(slots, new.logits)

    def _shared_length(self, prompt: Sequence[int]) -> int:
        """The number of the prompt's first tokens whose states are stored once for all rows."""
        prefix = self._shared_prefix.tokens if self._shared_prefix else ()
        return len(prefix) if prefix == tuple(prompt[: len(prefix)]) else 0

    def _next_rows(self, waiting: deque[Task]) -> list[_Row]:
        """The next tasks that fit in one prefill pass."""
        rows: list[_Row] = []
        while waiting and len(rows) < self._free:
            task = waiting[0]
            new = PrefillRow(task.prompt, *self._prefix_cache.longest(task.prompt))
            if rows and prefill_positions([*(row.prefill for row in rows), new]) > PREFILL_POSITIONS:
                break
            rows.append(_Row(task, new, uniform_numbers(task.seed, self._limit)))
            waiting.popleft()
        return rows

    def _free_slots(self, count: int, width: int) -> list[int]:
        """Slots for `count` new rows of at most `width` columns. The cache is enlarged where it is too small."""
        free = [slot for slot, row in enumerate(self._rows) if row is None]
        present, added = len(self._rows), max(count - len(free), 0)
        if added or width > self._batch_cache.end or len(self._batch_cache.row_starts) < present:
            self._reallocate([*range(present), *[0] * added], width)
        self._rows += [None] * added
        return [*free, *range(present, present + added)][:count]

    def _reallocate(self, slots: Sequence[int], width: int) -> None:
        rows = torch.tensor(slots, device=self._device)
        self._batch_cache.reallocate(rows, width)
        self._last_tokens = self._last_tokens[rows] if len(self._last_tokens) else torch.zeros_like(rows)

    def _step(self) -> Iterator[Finished]:
        """Sample one more token for every row."""
        if self._batch_cache.is_full:
            self._reallocate(range(len(self._rows)), 0)
        prefix, has_prefix = self._shared_prefix, self._batch_cache.prefix_lengths > 0
        with attending_to_prefix(self._config, prefix, has_prefix) if prefix else nullcontext():
            logits = self._forward(
                self._last_tokens[:, None],
                attention_mask=self._batch_cache.attention_mask(),
                position_ids=self._batch_cache.position_ids(),
                past_key_values=self._batch_cache.cache,
                logits_to_keep=1,
            ).logits[:, -1]
        self._batch_cache.end += 1
        yield from self._sample(range(len(self._rows)), logits)

    def _sample(self, slots: Sequence[int], logits: Tensor) -> Iterator[Finished]:
        """Sample these slots' next tokens, and free the slots of rows that end with them."""
        rows = [self._rows[slot] for slot in slots]
        if self._temperature > 0:
            uniforms = np.array([row.uniforms[len(row.tokens)] if row else 0.0 for row in rows])
            tokens, _ = sample(logits, uniforms, self._temperature, self._top_p)
        else:
            tokens = most_likely(logits)
        self._last_tokens[torch.tensor(slots, device=self._device)] = tokens
        ended: list[Finished] = []
        for slot, row, token in zip(slots, rows, tokens.tolist(), strict=True):
            if row is None:
                continue
            row.tokens.append(token)
            if token in self._stops or len(row.tokens) == self._limit:
                self._cache_conversation(slot, row)
                ended.append((row.task, row.tokens, "stop" if token in self._stops else "length"))
                self._rows[slot] = None
        if ended:
            self._trim()
        yield from ended

    def _cache_conversation(self, slot: int, row: _Row) -> None:
        """Cache a finished row for prompts that continue it, without its last token, whose states were not computed."""
        parent, inherited = row.prefill.prefix, row.prefill.cached
        shared = self._shared_length(row.task.prompt)
        if inherited < shared:
            parent, inherited = self._shared_prefix, shared
        tokens = (*row.task.prompt, *row.tokens[:-1])
        self._prefix_cache.add(CachedPrefix(tokens, self._batch_cache.states(slot, inherited), parent, inherited))

    def _trim(self) -> None:
        self._batch_cache.trim([slot for slot, row in enumerate(self._rows) if row is None])

    def _drop_finished(self) -> None:
        kept = [slot for slot, row in enumerate(self._rows) if row is not None]
        if kept and len(self._rows) - len(kept) >= max(1, DROP_SHARE * len(self._rows)):
            self._reallocate(kept, 0)
            self._rows = [self._rows[slot] for slot in kept]

    def _forward(self, ids: Tensor, **inputs: Any) -> Any:
        with torch.no_grad(), eval_mode(self._model):
            return self._model(input_ids=ids, use_cache=True, **inputs)
