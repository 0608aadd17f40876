"""The cache of rows that all take their next token in the same column.

A row is the columns from where it begins up to there; one that joins is laid so that its prompt ends where the others
stand. A step then writes one column for all rows, and copies none.

Shapes: R rows, K key-value heads, S columns in use, D features a head.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from align.decoding.prefix_cache import States


class BatchCache:
    """Keys and values of rows, in buffers with room for `spare` columns more whenever they are laid out anew.

    The columns in use go from `start`, where the longest row begins, to `end`, which is written next. `begins` (R,)
    has the first column of each row; an empty row has one column, as attention needs at least one. `elsewhere` (R,)
    says how many tokens come before it whose states are kept elsewhere.
    """

    def __init__(self, config: PreTrainedConfig, spare: int, device: torch.device) -> None:
        self.start = self.end = 0
        self.begins = torch.zeros(0, dtype=torch.long, device=device)
        self.elsewhere = torch.zeros_like(self.begins)
        self.cache: Cache = DynamicCache(config=config)
        self.cache.layers = []
        self._config, self._spare = config, spare

    @property
    def width(self) -> int:
        """S."""
        return self.end - self.start

    @property
    def is_full(self) -> bool:
        """Whether there is no column left to write."""
        return self.end == self.cache.layers[0].keys.shape[2]

    def lay_out(self, rows: Tensor, width: int) -> None:
        """Keep these rows, perhaps one of them several times, with so many columns at least before `end`."""
        end = max(width, self.width)
        for layer in self.cache.layers:
            layer.move(rows, end, end + self._spare)
        shift = end - self.end
        if len(self.begins):
            self.begins, self.elsewhere = self.begins[rows] + shift, self.elsewhere[rows]
        else:
            self.begins, self.elsewhere = rows.new_full(rows.shape, end), torch.zeros_like(rows)
        self.start, self.end = self.start + shift if self.cache.layers else end, end

    def put(self, slot: int, source: Cache, row: int, columns: slice, elsewhere: int) -> None:
        """Lay columns of another cache's row here, but for those of its first tokens that are kept elsewhere."""
        if not self.cache.layers:
            like = source.layers[0].keys
            self.cache.layers = [
                BatchCacheLayer(self, like, len(self.begins), self.end + self._spare) for _ in source.layers
            ]
        columns = slice(columns.start + elsewhere, columns.stop)
        begin = self.end - (columns.stop - columns.start)
        for target, layer in zip(self.cache.layers, source.layers, strict=True):
            target.keys[slot, :, begin : self.end] = layer.keys[row, :, columns]
            target.values[slot, :, begin : self.end] = layer.values[row, :, columns]
        self.begins[slot], self.elsewhere[slot] = begin, elsewhere

    def states(self, slot: int, first: int) -> States:
        """Copies of a row's states from this token on, which must be here."""
        columns = slice(int(self.begins[slot] - self.elsewhere[slot]) + first, self.end)
        return [
            (layer.keys[slot, :, columns].clone(), layer.values[slot, :, columns].clone())
            for layer in self.cache.layers
        ]

    def narrow(self, empty: list[int]) -> None:
        """Let the columns in use begin with the longest row, given which are empty."""
        self.begins[empty], self.elsewhere[empty] = self.end, 0
        self.start = min(int(self.begins.min()), self.end)

    def mask(self) -> Tensor:
        """(R, S + 1) what each row's next token sees, itself included."""
        columns = torch.arange(self.start, self.end + 1, device=self.begins.device)
        return (columns >= self.begins[:, None]).long()

    def positions(self) -> Tensor:
        """(R, 1) the position of each row's next token."""
        return (self.end - self.begins + self.elsewhere)[:, None]


class BatchCacheLayer(DynamicLayer):
    """Keys and values (R, K, capacity, D) of one layer, of which the columns in use are shown."""

    def __init__(self, columns: BatchCache, like: Tensor, rows: int, capacity: int) -> None:
        super().__init__()
        self.columns = columns
        self.dtype, self.device = like.dtype, like.device
        self.keys = like.new_zeros(rows, like.shape[1], capacity, like.shape[3])
        self.values = torch.zeros_like(self.keys)
        self.is_initialized: bool = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write (R, K, 1, D) states behind the columns in use, and return views of all."""
        used = slice(self.columns.start, self.columns.end + 1)
        self.keys[:, :, used.stop - 1 : used.stop] = key_states
        self.values[:, :, used.stop - 1 : used.stop] = value_states
        return self.keys[:, :, used], self.values[:, :, used]

    def get_seq_length(self) -> int:
        return self.columns.width

    def move(self, rows: Tensor, end: int, capacity: int) -> None:
        """Keep these rows, those in use ending at another column of buffers with another capacity."""
        used = slice(self.columns.start, self.columns.end)
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_zeros(len(rows), old.shape[1], capacity, old.shape[3])
            new[:, :, end - self.columns.width : end] = old[:, :, used].index_select(0, rows)
            setattr(self, name, new)
