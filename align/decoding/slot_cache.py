"""A KV cache of fixed buffers in which every row has a slot, for decoding steps whose shapes never change.

Row r's keys and values stand in its slot from the first position on, without padding: a step writes one position of
each slot and attends to the positions written so far. Nothing else depends on lengths, so a step can be captured as a
CUDA graph and replayed, and an ended row's slot can be given to a waiting prompt at any time.

Shapes: R slots, S positions a slot has room for, H heads, K key-value heads, G = H / K heads that share one, D features
of a head.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._triton import has_triton
from transformers import AttentionInterface, PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from align.models.packed_attention import HALF_PRECISION

ATTENTION = "slots"

TILE_SIZES = (16, 32, 64, 128, 256)
"""Features of a head that the Triton kernel has tiles for."""

UNSUPPORTED = ("sliding_window", "softcap", "s_aux")
"""Options of attention that the step's kernels do not know."""


@dataclass(frozen=True)
class _Step:
    """Where the slots stand in a decoding step; all tensors are int32 on the device."""

    lengths: Tensor
    """(R,) positions each row attends to, the new one included."""
    query_starts: Tensor
    """(R + 1,) multiples of G."""
    slot_starts: Tensor
    """(R + 1,) multiples of S."""


_STEP: ContextVar[_Step] = ContextVar("decoding step")


class SlotLayer(DynamicLayer):
    """Keys and values (R * S, K, D) of one layer."""

    def __init__(self, cache: "SlotCache") -> None:
        super().__init__()
        self._cache = cache
        self.is_initialized: bool = False

    def reserve(self, like_keys: Tensor, like_values: Tensor) -> None:
        """Allocate buffers for states that look like these (N, K, L, D) ones."""
        size = self._cache.slots * self._cache.capacity
        self.dtype, self.device = like_keys.dtype, like_keys.device
        self.keys = like_keys.new_zeros(size, like_keys.shape[1], like_keys.shape[3])
        self.values = like_values.new_zeros(size, like_values.shape[1], like_values.shape[3])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write (R, K, 1, D) states at each row's next position, and return the whole buffers."""
        if not self.is_initialized:
            self.reserve(key_states, value_states)
        self.keys.index_copy_(0, self._cache.writes, key_states[:, :, 0])
        self.values.index_copy_(0, self._cache.writes, value_states[:, :, 0])
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return 0


class SlotCache:
    """The cache of all layers. `writes` (R,) says which entry of the buffers the step writes for each row."""

    def __init__(self, config: PreTrainedConfig, slots: int, capacity: int, device: torch.device) -> None:
        self.slots, self.capacity = slots, capacity
        self.first = torch.arange(slots, device=device) * capacity
        self.writes = self.first.clone()
        self.cache: Cache = DynamicCache(config=config)
        self.cache.layers = [SlotLayer(self) for _ in self.cache.layers]
        heads = config.num_attention_heads
        group = heads // (getattr(config, "num_key_value_heads", None) or heads)
        starts = torch.arange(slots + 1, dtype=torch.int32, device=device)
        self._query_starts, self._slot_starts = starts * group, starts * capacity

    def fill(self, slots: Sequence[int], source: Cache, rows: Sequence[int], length: int) -> None:
        """Copy the first `length` positions of rows of an ordinary cache into slots."""
        to = torch.tensor(slots, device=self.first.device)
        which = torch.tensor(rows, device=self.first.device)
        for layer, given in zip(self.cache.layers, source.layers, strict=True):
            if not layer.is_initialized:
                layer.reserve(given.keys, given.values)
            for buffer, states in ((layer.keys, given.keys), (layer.values, given.values)):
                laid_out = buffer.view(self.slots, self.capacity, *buffer.shape[1:])
                laid_out[to, :length] = states.index_select(0, which)[:, :, :length].transpose(1, 2)

    @contextmanager
    def step(self, positions: Tensor) -> Iterator[None]:
        """Within it, a forward pass of one token a row writes at these (R,) positions and attends up to them."""
        torch.add(self.first, positions, out=self.writes)
        lengths = (positions + 1).to(torch.int32)
        token = _STEP.set(_Step(lengths, self._query_starts, self._slot_starts))
        try:
            yield
        finally:
            _STEP.reset(token)


def slot_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention of (R, H, 1, D) queries to the written positions of their own slots; returns (R, 1, H, D)."""
    if any(options.get(name) is not None for name in UNSUPPORTED):
        raise NotImplementedError(f"slots have none of {', '.join(UNSUPPORTED)}")
    step = _STEP.get()
    (slots, heads, _, size), groups = query.shape, key.shape[1]
    scale = scaling if scaling is not None else size**-0.5
    if query.is_cuda and query.dtype in HALF_PRECISION:
        if has_triton() and size in TILE_SIZES:
            from align.decoding.slot_kernel import attend

            return attend(query, key, value, step.lengths, scale), None
        return _flash(query, key, value, step, scale), None
    keys, values = (states.view(slots, -1, *states.shape[1:]).transpose(1, 2) for states in (key, value))
    mask = torch.arange(keys.shape[2], device=query.device) < step.lengths[:, None]  # (R, S)
    result = torch.nn.functional.scaled_dot_product_attention(
        query, keys, values, attn_mask=mask[:, None, None], scale=scale, enable_gqa=groups != heads
    )
    return result.transpose(1, 2), None


def _flash(query: Tensor, key: Tensor, value: Tensor, step: _Step, scale: float) -> Tensor:
    (slots, heads, _, size), groups = query.shape, key.shape[1]
    # The heads that share keys stand where the kernel expects query positions, so that keys are read once for all.
    queries = query.reshape(slots, groups, -1, size).transpose(1, 2).reshape(-1, groups, size)  # (RG, K, D)
    shared, capacity = heads // groups, key.shape[0] // slots
    result = torch.ops.aten._flash_attention_forward(
        queries,
        key,
        value,
        step.query_starts,
        step.slot_starts,
        shared,
        capacity,
        0.0,
        False,
        False,
        scale=scale,
        seqused_k=step.lengths,
    )[0]
    return result.view(slots, shared, groups, size).transpose(1, 2).reshape(slots, 1, heads, size)


AttentionInterface.register(ATTENTION, slot_attention)
