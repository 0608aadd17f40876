"""Completions by continuous batching: a row that has ended makes room for a prompt that waits.

What a prompt has in common with an opening or with an earlier conversation is copied instead of computed; an opening
that all have is kept once for all rows.

Shapes: R rows, V vocabulary.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from align.decoding.batch_cache import BatchCache
from align.decoding.decode import draw, evaluating, reserved_cache
from align.decoding.prefill import PrefillRow, pass_size, read_prompts
from align.decoding.prefix_cache import CachedPrefix, PrefixCache
from align.decoding.shared_prefix_attention import LEAST, after_shared_prefix, can_attend_to_prefix
from align.decoding.shared_prefixes import find_shared_prefixes
from align.errors import NotFinite
from align.models.wrappers import inner_model, without_ddp
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


Finished = tuple[Task, list[int], FinishReason]


@dataclass
class _Row:
    task: Task
    joining: PrefillRow
    uniforms: np.ndarray
    tokens: list[int] = field(default_factory=list)


class ContinuousBatcher:
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
        self._config, self._device = inner.config, inner.device
        self._limit, self._temperature, self._top_p = max_new_tokens, temperature, top_p
        self._stops, self._pad_id = frozenset(stop_ids), pad_id
        self._store = PrefixCache(kept_tokens)
        self._opening: CachedPrefix | None = None
        self._places = rows
        self._rows: list[_Row | None] = []
        self._columns = BatchCache(self._config, 2 * max_new_tokens, self._device)
        self._next = torch.zeros(0, dtype=torch.long, device=self._device)

    def run(self, waiting: deque[Task]) -> Iterator[Finished]:
        """Complete all that waits, the first first; tokens include the stop token.

        The caller may put more tasks into `waiting` after any result: the next turn of a conversation joins at once.
        """
        self._read_openings([task.prompt for task in waiting])
        self._rows += [None] * (min(self._places, len(waiting)) - len(self._rows))
        while waiting or any(self._rows):
            yield from self._join(waiting)
            if not waiting:
                self._drop_ended()
            if any(self._rows):
                yield from self._step()

    def _read_openings(self, prompts: Sequence[Sequence[int]]) -> None:
        openings = find_shared_prefixes(prompts).ids if len(prompts) > 1 else []
        for ids in openings:
            if ids:
                cache = reserved_cache(self._config, len(ids))
                self._forward(torch.tensor([ids], device=self._device), past_key_values=cache, logits_to_keep=1)
                self.read += len(ids)
                states = [(layer.keys[0], layer.values[0]) for layer in cache.layers]
                prefix = CachedPrefix(tuple(ids), states)
                self._store.add(prefix)
                if openings == [ids] and len(ids) >= LEAST and can_attend_to_prefix(self._model, prefix):
                    self._opening = prefix

    @property
    def _free(self) -> int:
        return self._places - sum(row is not None for row in self._rows)

    def _join(self, waiting: deque[Task]) -> Iterator[Finished]:
        """Fill places with tasks that wait, in passes of a bounded size."""
        if self._free < max(1, JOIN_SHARE * self._places):
            return
        while waiting and self._free:
            joining = self._next_rows(waiting)
            widths = [len(row.task.prompt) - self._kept_once(row.task.prompt) for row in joining]
            slots = self._slots(len(joining), max(widths))
            read = read_prompts(
                self._forward, self._config, [row.joining for row in joining], self._pad_id, self._device
            )
            for number, (slot, row) in enumerate(zip(slots, joining, strict=True)):
                self._columns.put(slot, read.cache, number, read.columns[number], self._kept_once(row.task.prompt))
                self._rows[slot] = row
                self.read += len(row.joining.rest)
            self._narrow()
            yield from self._take(slots, read.logits)

    def _kept_once(self, prompt: Sequence[int]) -> int:
        """How many of a prompt's first tokens are those of the opening that is kept for all rows."""
        opening = self._opening.tokens if self._opening else ()
        return len(opening) if opening == tuple(prompt[: len(opening)]) else 0

    def _next_rows(self, waiting: deque[Task]) -> list[_Row]:
        """Tasks that join in one pass."""
        rows: list[_Row] = []
        while waiting and len(rows) < self._free:
            task = waiting[0]
            joining = PrefillRow(task.prompt, *self._store.longest(task.prompt))
            if rows and pass_size([*(row.joining for row in rows), joining]) > JOIN_POSITIONS:
                break
            rows.append(_Row(task, joining, np.random.default_rng(task.seed).random(self._limit)))
            waiting.popleft()
        return rows

    def _slots(self, count: int, width: int) -> list[int]:
        """Places for so many rows of at most this width; the columns are made to suffice."""
        free = [slot for slot, row in enumerate(self._rows) if row is None]
        there, added = len(self._rows), max(count - len(free), 0)
        if added or width > self._columns.end or len(self._columns.begins) < there:
            self._lay_out([*range(there), *[0] * added], width)
        self._rows += [None] * added
        return [*free, *range(there, there + added)][:count]

    def _lay_out(self, slots: Sequence[int], width: int) -> None:
        rows = torch.tensor(slots, device=self._device)
        self._columns.lay_out(rows, width)
        self._next = self._next[rows] if len(self._next) else torch.zeros_like(rows)

    def _step(self) -> Iterator[Finished]:
        """One token more for every row."""
        if self._columns.is_full:
            self._lay_out(range(len(self._rows)), 0)
        with self._after_opening():
            logits = self._forward(
                self._next[:, None],
                attention_mask=self._columns.mask(),
                position_ids=self._columns.positions(),
                past_key_values=self._columns.cache,
                logits_to_keep=1,
            ).logits[:, -1]
        self._columns.end += 1
        yield from self._take(range(len(self._rows)), logits)

    def _after_opening(self) -> AbstractContextManager[None]:
        if self._opening is None:
            return nullcontext()
        return after_shared_prefix(self._config, self._opening, self._columns.elsewhere > 0)

    def _take(self, slots: Sequence[int], logits: Tensor) -> Iterator[Finished]:
        """Draw these slots' next tokens; those that end leave."""
        rows = [self._rows[slot] for slot in slots]
        uniforms = np.array([row.uniforms[len(row.tokens)] if row else 0.0 for row in rows])
        tokens = self._draw(logits, uniforms)
        self._next[torch.tensor(slots, device=self._device)] = tokens
        ended: list[Finished] = []
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
        parent, known = row.joining.prefix, row.joining.known
        here = self._kept_once(row.task.prompt)
        if known < here:
            parent, known = self._opening, here
        tokens = (*row.task.prompt, *row.tokens[:-1])
        self._store.add(CachedPrefix(tokens, self._columns.states(slot, known), parent, known))

    def _narrow(self) -> None:
        self._columns.narrow([slot for slot, row in enumerate(self._rows) if row is None])

    def _drop_ended(self) -> None:
        kept = [slot for slot, row in enumerate(self._rows) if row is not None]
        if kept and len(self._rows) - len(kept) >= max(1, DROP_SHARE * len(self._rows)):
            self._lay_out(kept, 0)
            self._rows = [self._rows[slot] for slot in kept]

    def _forward(self, ids: Tensor, **inputs: Any) -> Any:
        with torch.no_grad(), evaluating(self._model):
            return self._model(input_ids=ids, use_cache=True, **inputs)
