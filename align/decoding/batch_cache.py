"""A KV cache whose rows end at the same column, for batches that rows join and leave while others go on.

A row occupies the columns from its own start up to the common end. A new row is placed so that its prompt ends where
the other rows end. Each decoding step then writes one column for all rows and copies nothing.

Shapes: R rows, K key-value heads, S columns in use, D features per head.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from align.decoding.prefix_cache import States


class BatchCache:
    """Keys and values of rows, in buffers that get `spare` free columns whenever they are reallocated.

    The columns in use are those from `start`, where the longest row starts, up to but without `end`, the column that
    is written next. `row_starts` (R,) are the rows' first columns. `prefix_lengths` (R,) are the numbers of tokens
    before those whose states are stored outside this cache, as a prefix that many rows share.
    """

    def __init__(self, config: PreTrainedConfig, spare: int, device: torch.device) -> None:
        self.start = self.end = 0
        self.row_starts = torch.zeros(0, dtype=torch.long, device=device)
        self.prefix_lengths = torch.zeros_like(self.row_starts)
        self.cache: Cache = DynamicCache(config=config)
        self.cache.layers = []
        self._spare = spare

    @property
    def width(self) -> int:
        """S."""
        return self.end - self.start

    @property
    def is_full(self) -> bool:
        """Whether no free column is left."""
        return self.end == self.cache.layers[0].keys.shape[2]

    def reallocate(self, rows: Tensor, width: int) -> None:
        """Copy these rows, each as often as it is listed, to buffers with at least `width` columns before `end`."""
        end = max(width, self.width)
        for layer in self.cache.layers:
            layer.reallocate(rows, end, end + self._spare)
        shift = end - self.end
        if len(self.row_starts):
            self.row_starts, self.prefix_lengths = self.row_starts[rows] + shift, self.prefix_lengths[rows]
        else:
            self.row_starts, self.prefix_lengths = rows.new_full(rows.shape, end), torch.zeros_like(rows)
        self.start, self.end = self.start + shift if self.cache.layers else end, end

    def write_row(self, slot: int, source: Cache, row: int, columns: slice, prefix_length: int) -> None:
        """Copy a row's columns from another cache, except for its first `prefix_length` tokens, stored elsewhere."""
        if not self.cache.layers:
            rows, capacity = len(self.row_starts), self.end + self._spare
            self.cache.layers = [BatchCacheLayer(self, layer, rows, capacity) for layer in source.layers]
        columns = slice(columns.start + prefix_length, columns.stop)
        start = self.end - (columns.stop - columns.start)
        for target, layer in zip(self.cache.layers, source.layers, strict=True):
            target.keys[slot, :, start : self.end] = layer.keys[row, :, columns]
            target.values[slot, :, start : self.end] = layer.values[row, :, columns]
        self.row_starts[slot], self.prefix_lengths[slot] = start, prefix_length

    def states(self, slot: int, first: int) -> States:
        """Copies of a row's states from its token number `first` on. They must all be stored in this cache."""
        columns = slice(int(self.row_starts[slot] - self.prefix_lengths[slot]) + first, self.end)
        return [
            (layer.keys[slot, :, columns].clone(), layer.values[slot, :, columns].clone())
            for layer in self.cache.layers
        ]

    def trim(self, empty: list[int]) -> None:
        """Empty these slots, and let the columns in use start with the longest row that is left."""
        self.row_starts[empty], self.prefix_lengths[empty] = self.end, 0
        self.start = min(int(self.row_starts.min()), self.end)

    def attention_mask(self) -> Tensor:
        """(R, S + 1) the columns that each row's next token attends to: at least its own, even in an empty slot."""
        columns = torch.arange(self.start, self.end + 1, device=self.row_starts.device)
        return (columns >= self.row_starts[:, None]).long()

    def position_ids(self) -> Tensor:
        """(R, 1) the position of each row's next token."""
        return (self.end - self.row_starts + self.prefix_lengths)[:, None]


class BatchCacheLayer(DynamicLayer):
    """One layer's keys and values (R, K, capacity, D). The model is shown only the columns in use.

    `like` is a layer whose heads, widths and dtype these have: values may be narrower than keys (DeepSeek).
    """

    def __init__(self, batch: BatchCache, like: Any, rows: int, capacity: int) -> None:
        super().__init__()
        self.batch = batch
        self.dtype, self.device = like.keys.dtype, like.keys.device
        self.keys, self.values = (
            states.new_zeros(rows, states.shape[1], capacity, states.shape[3]) for states in (like.keys, like.values)
        )
        self.is_initialized: bool = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write (R, K, 1, D) states in the next column, and return views of the columns in use and this one."""
        used = slice(self.batch.start, self.batch.end + 1)
        self.keys[:, :, used.stop - 1 : used.stop] = key_states
        self.values[:, :, used.stop - 1 : used.stop] = value_states
        return self.keys[:, :, used], self.values[:, :, used]

    def get_seq_length(self) -> int:
        return self.batch.width

    def reallocate(self, rows: Tensor, end: int, capacity: int) -> None:
        """Copy these rows to new buffers of `capacity` columns, in which the columns in use stop before `end`."""
        used = slice(self.batch.start, self.batch.end)
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_zeros(len(rows), old.shape[1], capacity, old.shape[3])
            new[:, :, end - self.batch.width : end] = old[:, :, used].index_select(0, rows)
            setattr(self, name, new)
