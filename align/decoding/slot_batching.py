"""Continuous batching with steps of a fixed shape, which a GPU replays as one CUDA graph.

A decoding step of a small model is hundreds of kernels, and launching them takes longer than running them. Captured
once as a graph, the whole step (model, sampling, stop flags) is launched by a single call. The host only looks at the
flags every few steps, to take out rows that have ended and to give their slots to prompts that wait.

Shapes: R slots, T tokens a completion may have, V vocabulary.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers.cache_utils import DynamicCache

from align.decoding.continuous_batching import Task
from align.decoding.fused_norms import fused_norms, fusible_norms
from align.decoding.sampling import sample_without_waiting, uniform_numbers
from align.decoding.shared_prefixes import can_share_prefixes
from align.decoding.slot_cache import ATTENTION, SlotCache
from align.errors import NotFinite
from align.models.padding import right_padded
from align.models.wrappers import eval_mode, inner_model, without_ddp
from align.records import FinishReason

STEPS_BETWEEN_LOOKS = 16
"""Steps replayed before the host reads which rows have ended."""

PREFILL_POSITIONS = 2**14
"""Positions, padding included, of one pass over waiting prompts."""

ROWS_ON_GPU = 256
"""Completions that a GPU writes at a time, memory allowing: up to here a step takes hardly longer for more rows."""

CACHE_SHARE = 0.7
"""Share of the GPU's free memory that the KV cache may take."""

LARGEST_DIFFERENCE = 0.1
"""Nats by which bf16's rounding may let a log-prob differ from that of a plain pass."""

CHECKED = "_align_can_use_slots"

ROUNDED_TO = 64
"""Slots have room for a multiple of this many positions, so that few shapes occur."""


class Finished(NamedTuple):
    """A completion: tokens (stop token included), their log-probs in nats and, when kept, the values before them."""

    task: Task
    tokens: list[int]
    finish_reason: FinishReason
    logprobs: list[float]
    values: list[float]


def can_use_slots(model: Any) -> bool:
    """Whether a model on a GPU can be decoded so, found out by trying: its log-probs must be those of a plain pass."""
    inner = inner_model(model)
    if inner.device.type != "cuda" or not can_share_prefixes(inner.config):
        return False
    if not hasattr(inner, CHECKED):
        setattr(inner, CHECKED, _computes_the_same(model))
    return bool(getattr(inner, CHECKED))


def _computes_the_same(model: Any) -> bool:
    options: dict[str, Any] = {"max_new_tokens": 2, "temperature": 0.0, "top_p": 1.0, "stop_ids": [], "pad_id": 0}
    tasks = [Task(number, list(range(1, 4 + 3 * number)), 0) for number in range(2)]
    try:
        for task, tokens, _, logprobs, _ in SlotBatcher(model, rows=2, **options).run(deque(tasks)):
            ids = torch.tensor([[*task.prompt, *tokens]], device=inner_model(model).device)
            with torch.no_grad(), eval_mode(model):
                scores = without_ddp(model)(input_ids=ids, use_cache=False, logits_to_keep=3).logits[0, :-1].float()
            plain = scores.log_softmax(-1).gather(-1, ids[0, -2:, None])[:, 0].tolist()
            if max(abs(a - b) for a, b in zip(plain, logprobs, strict=True)) > LARGEST_DIFFERENCE:
                return False
    except Exception:  # a model of another kind, or a missing compiler, may fail in any way
        return False
    return True


class SlotBatcher:
    """Completes any number of prompts in at most `rows` slots; on a GPU by replaying a captured step.

    `prefilled` counts the prompt tokens that went through the model.

    Raises:
        NotFinite: the model's logits are NaN or infinite.
    """

    def __init__(
        self,
        model: Any,
        *,
        rows: int,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        stop_ids: Sequence[int],
        pad_id: int,
        keep_values: bool = False,
    ) -> None:
        self.prefilled = 0
        self._model = without_ddp(model)
        inner = inner_model(model)
        self._config, self._device = inner.config, inner.device
        self._rows, self._limit = rows, max_new_tokens
        self._temperature, self._top_p, self._pad_id = temperature, top_p, pad_id
        self._stops = torch.tensor(sorted(stop_ids), dtype=torch.long, device=self._device)
        self._keep_values = keep_values
        self._tasks: list[Task | None] = []
        self._graph: Any = None
        modules = getattr(self._model, "models", self._model)
        self._norms = fusible_norms(modules) if self._device.type == "cuda" else []

    def run(self, waiting: deque[Task]) -> Iterator[Finished]:
        """Complete all tasks, the first first. The caller may append more tasks after any result."""
        with torch.no_grad(), eval_mode(self._model):
            while waiting or any(self._tasks):
                self._admit(waiting)
                self._advance()
                yield from self._take_ended()

    def _reserve(self, waiting: Sequence[Task]) -> None:
        """Make the slots and their state, for prompts as long as those that wait."""
        longest = max(map(self._positions_of, waiting))
        capacity = -(-longest // ROUNDED_TO) * ROUNDED_TO
        slots = min(self._rows, len(waiting), self._affordable(capacity))
        device, limit = self._device, self._limit
        self._cache = SlotCache(self._config, slots, capacity, device)
        self._tasks = [None] * slots
        self._graph = None
        self._next = torch.full((slots,), self._pad_id, device=device)
        self._positions = torch.zeros(slots, dtype=torch.long, device=device)
        self._counts = torch.zeros(slots, dtype=torch.long, device=device)
        self._done = torch.ones(slots, dtype=torch.bool, device=device)
        self._finite = torch.ones((), dtype=torch.bool, device=device)
        self._uniforms = torch.zeros(slots, limit, dtype=torch.float64, device=device)
        self._tokens = torch.zeros(slots, limit, dtype=torch.long, device=device)
        self._logprobs = torch.zeros(slots, limit, device=device)
        self._values = torch.zeros(slots, limit, device=device)

    def _affordable(self, capacity: int) -> int:
        """Slots of this capacity that fit the GPU's free memory, at least one."""
        if self._device.type != "cuda":
            return self._rows
        config = self._config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        a_slot = 2 * config.num_hidden_layers * heads * size * capacity * self._model.dtype.itemsize
        free = torch.cuda.mem_get_info(self._device)[0]
        free += torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        return max(1, int(CACHE_SHARE * free) // a_slot)

    def _admit(self, waiting: deque[Task]) -> None:
        """Give free slots to waiting tasks."""
        if not waiting:
            return
        if not any(self._tasks) and (not self._tasks or self._positions_of(waiting[0]) > self._cache.capacity):
            self._reserve(waiting)
        free = [slot for slot, task in enumerate(self._tasks) if task is None]
        admitted: dict[int, Task] = {}
        # A longer prompt than the slots have room for waits until all are free, and then has larger ones made.
        while waiting and free and self._positions_of(waiting[0]) <= self._cache.capacity:
            admitted[free.pop(0)] = waiting.popleft()
        if admitted:
            self._prefill(admitted)

    def _positions_of(self, task: Task) -> int:
        """Positions that the task may take in its slot."""
        return len(task.prompt) + self._limit

    def _prefill(self, admitted: dict[int, Task]) -> None:
        """Read all of each prompt but its last token, which the first step takes; equal prompts are read once."""
        slots_of: dict[tuple[int, ...], list[int]] = {}
        for slot, task in admitted.items():
            slots_of.setdefault(tuple(task.prompt[:-1]), []).append(slot)
        beginnings = sorted((ids for ids in slots_of if ids), key=len)
        while beginnings:
            count = max(1, min(len(beginnings), PREFILL_POSITIONS // len(beginnings[-1])))
            batch, beginnings = beginnings[-count:], beginnings[:-count]
            self._read(batch, slots_of)
        where = torch.tensor(list(admitted), device=self._device)
        tasks = list(admitted.values())
        uniforms = np.stack([uniform_numbers(task.seed, self._limit) for task in tasks])
        self._uniforms[where] = torch.from_numpy(uniforms).to(self._device)
        self._next[where] = torch.tensor([task.prompt[-1] for task in tasks], device=self._device)
        self._positions[where] = torch.tensor([len(task.prompt) - 1 for task in tasks], device=self._device)
        self._counts[where] = 0
        self._done[where] = False
        for slot, task in admitted.items():
            self._tasks[slot] = task

    def _read(self, batch: Sequence[tuple[int, ...]], slots_of: dict[tuple[int, ...], list[int]]) -> None:
        ids, _ = right_padded(batch, self._pad_id, self._device)
        cache = DynamicCache(config=self._config)
        # Causal attention needs no mask: what comes before a token is never padding.
        positions = torch.arange(ids.shape[1], device=self._device).expand_as(ids)
        self._model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1)
        self.prefilled += sum(map(len, batch))
        rows = [row for row, prompt in enumerate(batch) for _ in slots_of[prompt]]
        self._cache.fill([slot for prompt in batch for slot in slots_of[prompt]], cache, rows, ids.shape[1])

    def _advance(self) -> None:
        """Some tokens more for every row."""
        usual = self._config._attn_implementation
        self._config._attn_implementation = ATTENTION
        try:
            if self._device.type != "cuda":
                self._step()
                return
            steps = min(STEPS_BETWEEN_LOOKS, self._limit)
            if self._graph is None:
                self._step()  # what is initialised at first use must be before a graph is captured
                steps -= 1
                self._graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self._graph):
                    self._step()
            for _ in range(steps):
                self._graph.replay()
        finally:
            self._config._attn_implementation = usual

    def _step(self) -> None:
        """One token more for every row that has not ended; the host learns nothing."""
        with self._cache.step(self._positions), fused_norms(self._norms):
            given = self._model(
                input_ids=self._next[:, None],
                position_ids=self._positions[:, None],
                past_key_values=self._cache.cache,
                use_cache=True,
                logits_to_keep=1,
            )
        place = self._counts.clamp(max=self._limit - 1)[:, None]
        tokens, logprobs, finite = sample_without_waiting(
            given.logits[:, -1], self._uniforms.gather(1, place)[:, 0], self._temperature, self._top_p
        )
        writing = ~self._done
        self._finite &= (finite | self._done).all()
        for kept, new in ((self._tokens, tokens), (self._logprobs, logprobs)):
            kept.scatter_(1, place, torch.where(writing[:, None], new[:, None], kept.gather(1, place)))
        if self._keep_values:
            values = torch.where(writing[:, None], given.values[:, -1:].float(), self._values.gather(1, place))
            self._values.scatter_(1, place, values)
        self._counts += writing
        self._done |= torch.isin(tokens, self._stops) | (self._counts >= self._limit)
        self._next.copy_(torch.where(self._done, self._next, tokens))
        # An ended row keeps its slot until the host looks; at the first position it costs next to nothing.
        self._positions.copy_(torch.where(self._done, 0, self._positions + 1))

    def _take_ended(self) -> Iterator[Finished]:
        done, finite = self._done.tolist(), bool(self._finite)
        if not finite:
            raise NotFinite("sampling: the model's logits are not finite (NaN or infinity); its weights are broken")
        ended = [slot for slot, task in enumerate(self._tasks) if task is not None and done[slot]]
        if not ended:
            return
        where = torch.tensor(ended, device=self._device)
        counts = self._counts[where].tolist()
        tokens, logprobs = self._tokens[where].tolist(), self._logprobs[where].tolist()
        values = self._values[where].tolist() if self._keep_values else [[]] * len(ended)
        stops = set(self._stops.tolist())
        for slot, count, *each in zip(ended, counts, tokens, logprobs, values, strict=True):
            task = self._tasks[slot]
            assert task is not None
            self._tasks[slot] = None
            written, logs, valued = (kept[:count] for kept in each)
            yield Finished(task, written, "stop" if written[-1] in stops else "length", logs, valued)
