"""Prefixes that rows of tokens share (a system prompt, worked examples), run through the model once for all rows.

Shapes: B rows, G prefixes, P positions of the longest prefix, L positions of the longest rest of a row. A row's
positions are [padding, its prefix, padding, the rest of the row].
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from align.decoding.prefix_cache import common_prefix_length
from align.models.padding import left_padded, position_ids


@dataclass(frozen=True)
class SharedPrefixes:
    """The token ids of each prefix, and the index of each row's prefix."""

    ids: list[list[int]]
    of_row: list[int]

    @classmethod
    def none(cls, rows: int) -> "SharedPrefixes":
        """Rows that share nothing: one empty prefix."""
        return cls([[]], [0] * max(rows, 1))

    @property
    def positions_saved(self) -> int:
        """The number of positions that sharing spares the model."""
        return sum(len(self.ids[prefix]) for prefix in self.of_row) - sum(map(len, self.ids))


def find_shared_prefixes(rows: Sequence[Sequence[int]]) -> SharedPrefixes:
    """Group rows by their longest common prefixes, each at least one token shorter than its rows.

    In sorted order, rows with a common prefix are neighbours. A new group begins where two neighbours share less than
    half of the median over all neighbours.
    """
    order = sorted(range(len(rows)), key=lambda row: list(rows[row]))
    shared = [common_prefix_length(rows[a], rows[b]) for a, b in pairwise(order)]
    if not shared:
        return SharedPrefixes.none(len(rows))
    median = sorted(shared)[len(shared) // 2]
    groups = [[order[0]]]
    for row, length in zip(order[1:], shared, strict=True):
        if 2 * length < median:
            groups.append([])
        groups[-1].append(row)
    ids: list[list[int]] = []
    of_row = [0] * len(rows)
    for number, group in enumerate(groups):
        in_common = common_prefix_length(rows[group[0]], rows[group[-1]])
        ids.append(list(rows[group[0]][: min(in_common, min(len(rows[row]) for row in group) - 1)]))
        for row in group:
            of_row[row] = number
    return SharedPrefixes(ids, of_row) if all(ids) and len(ids) < len(rows) else SharedPrefixes.none(len(rows))


@dataclass(frozen=True)
class PrefixBatch:
    """SharedPrefixes as tensors: `ids` and `mask` (G, P), and `of_row` (B,) the index of each row's prefix."""

    ids: Tensor
    mask: Tensor
    of_row: Tensor
    encoded: "EncodedPrefixes | None" = None

    @property
    def width(self) -> int:
        """P, which is 0 where rows share nothing."""
        return self.ids.shape[1]

    def full_mask(self, mask: Tensor) -> Tensor:
        """(B, P + L) the attention mask of whole rows, from the (B, L) mask of their rests."""
        return torch.cat([self.mask[self.of_row], mask], dim=1)

    def encode(self, forward: Callable[..., Any], cache: Cache, **options: Any) -> Cache:
        """Run the prefixes through a model, which fills the cache with G rows of keys and values."""
        forward(
            input_ids=self.ids,
            attention_mask=self.mask,
            position_ids=position_ids(self.mask),
            past_key_values=cache,
            use_cache=True,
            **options,
        )
        return cache

    def cache_for_rows(self, forward: Callable[..., Any], config: PreTrainedConfig) -> Cache:
        """A cache of B rows of keys and values, through which gradients flow back into the prefixes."""
        if self.encoded:
            return self.encoded.cache_for_rows(self.of_row, config)
        cache: Any = self.encode(forward, DynamicCache(config=config))
        for layer in cache.layers:
            layer.keys = layer.keys.index_select(0, self.of_row)
            layer.values = layer.values.index_select(0, self.of_row)
        return cache

    def for_rows(self, of_row: Sequence[int]) -> "PrefixBatch":
        """The same prefixes with other rows."""
        return replace(self, of_row=torch.tensor(of_row, device=self.ids.device))


class EncodedPrefixes:
    """Prefixes that were encoded once for several passes over different rows.

    The passes accumulate their gradients in float32 copies of the keys and values. `backward` then propagates the sums
    through the encoding pass.
    """

    def __init__(self, cache: Cache) -> None:
        self._computed = [state for layer in cache.layers for state in (layer.keys, layer.values)]  # type: ignore[attr-defined]
        self._leaves = [state.detach().float().requires_grad_() for state in self._computed]

    def attach(self, prefixes: PrefixBatch) -> PrefixBatch:
        """The prefixes of a pass, with their encoding: the pass need not encode them again."""
        return replace(prefixes, encoded=self)

    def cache_for_rows(self, of_row: Tensor, config: PreTrainedConfig) -> Cache:
        """A cache of B rows of keys and values."""
        cache = DynamicCache(config=config)
        states = [
            leaf.index_select(0, of_row).to(computed.dtype)
            for leaf, computed in zip(self._leaves, self._computed, strict=True)
        ]
        for number, (keys, values) in enumerate(zip(states[::2], states[1::2], strict=True)):
            cache.update(keys, values, number)
        return cache

    def backward(self) -> None:
        """Propagate the gradients that the passes accumulated through the encoding pass."""
        reached = [
            (computed, leaf.grad.to(computed.dtype))
            for computed, leaf in zip(self._computed, self._leaves, strict=True)
            if leaf.grad is not None and computed.requires_grad
        ]
        if reached:
            torch.autograd.backward([computed for computed, _ in reached], [gradient for _, gradient in reached])


def prefix_batch(shared: SharedPrefixes, pad_id: int, device: torch.device) -> PrefixBatch:
    """Convert to tensors, padded on the left."""
    ids, mask = left_padded(shared.ids, pad_id, device)
    return PrefixBatch(ids, mask, torch.tensor(shared.of_row, device=device))


def without_prefixes(rows: Sequence[Sequence[int]], prefixes: SharedPrefixes) -> list[Sequence[int]]:
    """Each row's tokens after its prefix."""
    return [row[len(prefixes.ids[group]) :] for row, group in zip(rows, prefixes.of_row, strict=True)]


def can_share_prefixes(config: PreTrainedConfig) -> bool:
    """Whether all layers of a model's cache store plain keys and values, from which rows can be selected."""
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)
