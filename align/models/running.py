"""Completions by continuous batching: a row that has ended makes room for a prompt that waits.

All rows take their next token in the same column of the cache, so a row is the columns from where it begins up to
there, and one that joins is laid so that its prompt ends where the others stand. What a prompt has in common with an
opening or with an earlier conversation is copied instead of computed.

Shapes: R running rows, S columns in use, N rows that join, P columns of their longest prefix, L of their longest rest.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from align.errors import NotFinite
from align.models.decode import ReservedLayer, draw, evaluating, reserved_cache
from align.models.openings import right_padded, shared_openings
from align.models.prefixes import Prefix, PrefixStore
from align.models.wrapped import inner_model, without_ddp
from align.records import FinishReason

JOIN_SHARE = 1 / 16
"""Rows join once they can take this share of the places: each time costs a pass that reads all weights."""

DROP_SHARE = 1 / 4
"""With nothing left to join, ended rows leave once they are this share: each time costs a copy of the cache."""

JOIN_POSITIONS = 4096
"""Positions, padding and prefixes included, of one pass of rows that join."""


@dataclass(frozen=True)
class Task:
    """A prompt to complete; `key` is the caller's name for it."""

    key: Any
    prompt: Sequence[int]
    seed: int


@dataclass
class _Row:
    task: Task
    prefix: Prefix | None
    prefix_length: int
    uniforms: np.ndarray
    tokens: list[int] = field(default_factory=list)

    @property
    def rest(self) -> Sequence[int]:
        return self.task.prompt[self.prefix_length :]


@dataclass
class _Span:
    """The columns in use: from the first of the longest row to the one that is written next."""

    start: int = 0
    end: int = 0


class _ColumnLayer(DynamicLayer):
    """Keys and values (R, K, capacity, D) of one layer, of which the span's columns are in use."""

    def __init__(self, span: _Span, like: Tensor, rows: int, capacity: int) -> None:
        super().__init__()
        self.span = span
        self.dtype, self.device = like.dtype, like.device
        self.keys = like.new_zeros(rows, like.shape[1], capacity, like.shape[3])
        self.values = torch.zeros_like(self.keys)
        self.is_initialized: bool = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write (R, K, 1, D) states behind the span, and return views of all in use."""
        end = self.span.end + 1
        self.keys[:, :, end - 1 : end] = key_states
        self.values[:, :, end - 1 : end] = value_states
        return self.keys[:, :, self.span.start : end], self.values[:, :, self.span.start : end]

    def get_seq_length(self) -> int:
        return self.span.end - self.span.start

    def move(self, rows: Tensor, end: int, capacity: int) -> None:
        """Keep these rows, the span ending at another column of buffers with another capacity."""
        start = end - self.get_seq_length()
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_zeros(len(rows), old.shape[1], capacity, old.shape[3])
            new[:, :, start:end] = old[:, :, self.span.start : self.span.end].index_select(0, rows)
            setattr(self, name, new)


class Running:
    """A causal LM (wrapped by PEFT or DDP, perhaps) at work on at most `rows` completions at a time.

    `kept_tokens` bounds what is remembered of openings and ended conversations, so that a task whose prompt goes on
    from one reads its new tokens alone. `read` counts the prompt tokens that went through the model.
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
        self.read = 0
        self._model = without_ddp(model)
        inner = inner_model(model)
        self._config: PreTrainedConfig = inner.config
        self._device: torch.device = inner.device
        self._limit, self._temperature, self._top_p = max_new_tokens, temperature, top_p
        self._stops, self._pad_id = frozenset(stop_ids), pad_id
        self._store = PrefixStore(kept_tokens)
        self._places = rows
        self._rows: list[_Row | None] = []
        self._span = _Span()
        self._begins = torch.zeros(0, dtype=torch.long, device=self._device)
        self._next = torch.zeros(0, dtype=torch.long, device=self._device)
        self._cache: Cache | None = None

    def run(self, waiting: deque[Task]) -> Iterator[tuple[Task, list[int], FinishReason]]:
        """Complete all that waits, the first first; tokens include the stop token.

        The caller may put more tasks into `waiting` after any result: the next turn of a conversation joins at once.
        """
        self._read_openings([task.prompt for task in waiting])
        self._rows = [None] * min(self._places, len(waiting))
        while True:
            yield from self._join(waiting)
            if not any(self._rows):
                if waiting:
                    continue
                return
            if not waiting:
                self._drop_ended()
            yield from self._step()

    def _read_openings(self, prompts: Sequence[Sequence[int]]) -> None:
        for ids in shared_openings(prompts).ids if len(prompts) > 1 else []:
            if ids:
                cache = reserved_cache(self._config, len(ids))
                self._forward(torch.tensor([ids], device=self._device), past_key_values=cache, logits_to_keep=1)
                self.read += len(ids)
                states = [(layer.keys[0], layer.values[0]) for layer in cache.layers]
                self._store.add(Prefix(tuple(ids), states))

    def _join(self, waiting: deque[Task]) -> Iterator[tuple[Task, list[int], FinishReason]]:
        """Fill places with tasks that wait, in passes of a bounded size."""
        running = sum(row is not None for row in self._rows)
        if running and self._places - running < max(1, JOIN_SHARE * self._places):
            return
        while waiting and running < self._places:
            joining: list[_Row] = []
            while waiting and running + len(joining) < self._places:
                row = self._row(waiting[0])
                if joining and _pass_size([*joining, row]) > JOIN_POSITIONS:
                    break
                joining.append(row)
                waiting.popleft()
            slots = self._slots(len(joining), max(len(row.task.prompt) for row in joining))
            yield from self._take(slots, self._prefill(joining, slots))
            running = sum(row is not None for row in self._rows)

    def _row(self, task: Task) -> _Row:
        prefix, length = self._store.longest(task.prompt)
        return _Row(task, prefix, length, np.random.default_rng(task.seed).random(self._limit))

    def _slots(self, count: int, width: int) -> list[int]:
        """Places for so many rows of at most this width; the columns are made to suffice."""
        free = [slot for slot, row in enumerate(self._rows) if row is None]
        added = max(count - len(free), 0)
        free += range(len(self._rows), len(self._rows) + added)
        everyone = torch.tensor([*range(len(self._rows)), *[0] * added], device=self._device)
        self._rows += [None] * added
        if self._cache is None:
            self._begins, self._next = torch.zeros(2, len(self._rows), dtype=torch.long, device=self._device)
            self._span.start = self._span.end = width
        elif added or width > self._span.end:
            self._move(everyone, max(width, self._span.end - self._span.start))
        return free[:count]

    def _move(self, rows: Tensor, end: int) -> None:
        """Lay these rows out anew, with columns up to `end` in use and as many free as a completion may take twice."""
        for layer in self._cache.layers if self._cache else []:
            layer.move(rows, end, end + 2 * self._limit)
        shift = end - self._span.end
        self._begins, self._next = self._begins[rows] + shift, self._next[rows]
        self._span.start, self._span.end = self._span.start + shift, end

    def _prefill(self, joining: Sequence[_Row], slots: Sequence[int]) -> Tensor:
        """Read the rows' prompts into these slots; (N, V) logits of their first tokens."""
        width = max(row.prefix_length for row in joining)
        ids, mask = right_padded([row.rest for row in joining], self._pad_id, self._device)
        lengths = mask.sum(-1)
        prefixes = torch.tensor([row.prefix_length for row in joining], device=self._device)
        before = torch.arange(width, device=self._device) >= width - prefixes[:, None]
        read = self._with_prefixes(joining, width, ids.shape[1])
        ends, which = (lengths - 1).unique(return_inverse=True)
        given = self._forward(
            ids,
            attention_mask=torch.cat([before.long(), mask], dim=1),
            position_ids=prefixes[:, None] + torch.arange(ids.shape[1], device=self._device),
            past_key_values=read,
            logits_to_keep=ends,
        )
        self.read += int(lengths.sum())
        if self._cache is None:
            self._cache = DynamicCache(config=self._config)
            self._cache.layers = [
                _ColumnLayer(self._span, layer.keys, len(self._rows), self._span.end + 2 * self._limit)
                for layer in read.layers
            ]
        for target, source in zip(self._cache.layers, read.layers, strict=True):
            for slot, number, row in zip(slots, range(len(joining)), joining, strict=True):
                columns = slice(width - row.prefix_length, width + len(row.rest))
                begin = self._span.end - len(row.task.prompt)
                target.keys[slot, :, begin : self._span.end] = source.keys[number, :, columns]
                target.values[slot, :, begin : self._span.end] = source.values[number, :, columns]
        for slot, row in zip(slots, joining, strict=True):
            self._rows[slot] = row
            self._begins[slot] = self._span.end - len(row.task.prompt)
        self._narrow()
        return given.logits[torch.arange(len(joining), device=self._device), which]

    def _with_prefixes(self, joining: Sequence[_Row], width: int, rest: int) -> Cache:
        """A cache that holds each row's prefix, padded on the left."""
        cache = reserved_cache(self._config, width + rest)
        source = next((row.prefix for row in joining if row.prefix), None)
        if source is None:
            return cache
        while source.parent:
            source = source.parent
        for number, (layer, (like, _)) in enumerate(zip(cache.layers, source.states, strict=True)):
            keys = like.new_zeros(len(joining), like.shape[0], width, like.shape[2])
            values = torch.zeros_like(keys)
            for index, row in enumerate(joining):
                if row.prefix:
                    start = width - row.prefix_length
                    row.prefix.write(number, keys[index, :, start:], values[index, :, start:])
            assert isinstance(layer, ReservedLayer)
            layer.update(keys, values)
        return cache

    def _step(self) -> Iterator[tuple[Task, list[int], FinishReason]]:
        """One token more for every row."""
        assert self._cache is not None
        if self._span.end == self._cache.layers[0].keys.shape[2]:
            everyone = torch.arange(len(self._rows), device=self._device)
            self._move(everyone, self._span.end - self._span.start)
        columns = torch.arange(self._span.start, self._span.end + 1, device=self._device)
        logits = self._forward(
            self._next[:, None],
            attention_mask=(columns >= self._begins[:, None]).long(),
            position_ids=(self._span.end - self._begins)[:, None],
            past_key_values=self._cache,
            logits_to_keep=1,
        ).logits[:, -1]
        self._span.end += 1
        yield from self._take(range(len(self._rows)), logits)

    def _take(self, slots: Sequence[int], logits: Tensor) -> Iterator[tuple[Task, list[int], FinishReason]]:
        """Draw these slots' next tokens; those that end leave."""
        rows = [self._rows[slot] for slot in slots]
        uniforms = np.array([row.uniforms[len(row.tokens)] if row else 0.0 for row in rows])
        tokens = self._draw(logits, uniforms)
        self._next[torch.tensor(slots, device=self._device)] = tokens
        ended: list[tuple[Task, list[int], FinishReason]] = []
        for slot, row, token in zip(slots, rows, tokens.tolist(), strict=True):
            if row is None:
                continue
            row.tokens.append(token)
            if token in self._stops or len(row.tokens) == self._limit:
                self._keep(slot, row)
                ended.append((row.task, row.tokens, "stop" if token in self._stops else "length"))
                self._rows[slot] = None
        if ended:
            self._narrow()
        yield from ended

    def _draw(self, logits: Tensor, uniforms: np.ndarray) -> Tensor:
        if self._temperature > 0:
            return draw(logits, uniforms, self._temperature, self._top_p)[0]
        peaks, tokens = logits.max(-1)
        if not peaks.isfinite().all():
            raise NotFinite("sampling: the model's logits are not finite (NaN or infinity); its weights are broken")
        return tokens

    def _keep(self, slot: int, row: _Row) -> None:
        """Remember an ended row, for a prompt that goes on from it. The last token was never read."""
        assert self._cache is not None
        shared = row.prefix_length
        begin = int(self._begins[slot])
        states = [
            (
                layer.keys[slot, :, begin + shared : self._span.end].clone(),
                layer.values[slot, :, begin + shared : self._span.end].clone(),
            )
            for layer in self._cache.layers
        ]
        tokens = tuple(row.task.prompt) + tuple(row.tokens[:-1])
        self._store.add(Prefix(tokens, states, row.prefix, shared))

    def _narrow(self) -> None:
        """Let the span begin with the longest row; an ended one is a column wide, as attention needs at least one."""
        empty = [slot for slot, row in enumerate(self._rows) if row is None]
        if empty:
            self._begins[torch.tensor(empty, device=self._device)] = self._span.end
        self._span.start = min(int(self._begins.min()), self._span.end)

    def _drop_ended(self) -> None:
        kept = [slot for slot, row in enumerate(self._rows) if row is not None]
        if len(self._rows) - len(kept) >= max(1, DROP_SHARE * len(self._rows)):
            self._move(torch.tensor(kept, device=self._device), self._span.end - self._span.start)
            self._rows = [self._rows[slot] for slot in kept]

    def _forward(self, ids: Tensor, **inputs: Any) -> Any:
        with torch.no_grad(), evaluating(self._model):
            return self._model(input_ids=ids, use_cache=True, **inputs)


def _pass_size(rows: Sequence[_Row]) -> int:
    """Positions of a pass of rows that join, padding included."""
    return len(rows) * (max(row.prefix_length for row in rows) + max(len(row.rest) for row in rows))
