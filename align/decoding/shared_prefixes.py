"""Beginnings that rows of tokens have in common (a system prompt, worked examples), put through a model once for all.

Shapes: B rows, G openings, P positions of the longest opening, L positions of the longest rest of a row. A row's
positions are then [padding, its opening, padding, the rest of it].
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from align.decoding.prefix_cache import common


@dataclass(frozen=True)
class SharedPrefixes:
    """The token ids of each opening, and which opening each row has."""

    ids: list[list[int]]
    of_row: list[int]

    @classmethod
    def none(cls, rows: int) -> "SharedPrefixes":
        """Nothing in common."""
        return cls([[]], [0] * max(rows, 1))

    @property
    def spared(self) -> int:
        """Positions that need not go through the model because rows share them."""
        return sum(len(self.ids[opening]) for opening in self.of_row) - sum(map(len, self.ids))


def find_shared_prefixes(rows: Sequence[Sequence[int]]) -> SharedPrefixes:
    """Group rows by their longest common beginnings, at least one token short of each row.

    In sorted order rows with a common beginning are neighbours; a group ends where two neighbours have less than half
    as much in common as is usual.
    """
    order = sorted(range(len(rows)), key=lambda row: list(rows[row]))
    shared = [common(rows[a], rows[b]) for a, b in pairwise(order)]
    if not shared:
        return SharedPrefixes.none(len(rows))
    usual = sorted(shared)[len(shared) // 2]
    groups = [[order[0]]]
    for row, length in zip(order[1:], shared, strict=True):
        if 2 * length < usual:
            groups.append([])
        groups[-1].append(row)
    ids: list[list[int]] = []
    of_row = [0] * len(rows)
    for number, group in enumerate(groups):
        length = min(common(rows[group[0]], rows[group[-1]]), min(len(rows[row]) for row in group) - 1)
        ids.append(list(rows[group[0]][:length]))
        for row in group:
            of_row[row] = number
    return SharedPrefixes(ids, of_row) if all(ids) and len(ids) < len(rows) else SharedPrefixes.none(len(rows))


@dataclass(frozen=True)
class PrefixBatch:
    """SharedPrefixes as tensors: `ids` and `mask` (G, P), and `of_row` (B,) the opening of each row."""

    ids: Tensor
    mask: Tensor
    of_row: Tensor

    @property
    def width(self) -> int:
        """P, 0 where rows have nothing in common."""
        return self.ids.shape[1]

    def before(self, mask: Tensor) -> Tensor:
        """(B, P + L) the attention mask of whole rows, given that of their rests, (B, L)."""
        return torch.cat([self.mask[self.of_row], mask], dim=1)

    def run(self, forward: Callable[..., Any], cache: Cache, **options: Any) -> Cache:
        """Put the openings through a model; the cache then holds G rows of keys and values."""
        forward(
            input_ids=self.ids,
            attention_mask=self.mask,
            position_ids=positions(self.mask),
            past_key_values=cache,
            use_cache=True,
            **options,
        )
        return cache

    def cache_for_rows(self, forward: Callable[..., Any], config: PreTrainedConfig) -> Cache:
        """A cache that holds B rows of keys and values, through which gradients flow back into the openings."""
        cache: Any = self.run(forward, DynamicCache(config=config))
        for layer in cache.layers:
            layer.keys = layer.keys.index_select(0, self.of_row)
            layer.values = layer.values.index_select(0, self.of_row)
        return cache

    def for_rows(self, of_row: Sequence[int]) -> "PrefixBatch":
        """The same openings for other rows."""
        return replace(self, of_row=torch.tensor(of_row, device=self.ids.device))


class EncodedPrefixes:
    """SharedPrefixes that a model has taken in once for several passes over different rows.

    Gradients of the passes gather in float32 copies of the keys and values, and go into the openings together.
    """

    def __init__(self, cache: Cache) -> None:
        self._computed = [state for layer in cache.layers for state in (layer.keys, layer.values)]  # type: ignore[attr-defined]
        self._leaves = [state.detach().float().requires_grad_() for state in self._computed]

    def before(self, openings: PrefixBatch) -> PrefixBatch:
        """The openings of a pass, which need not go through the model again."""
        return _EncodedPrefixBatch(openings.ids, openings.mask, openings.of_row, self)

    def cache_for_rows(self, of_row: Tensor, config: PreTrainedConfig) -> Cache:
        """A cache that holds B rows of keys and values."""
        cache = DynamicCache(config=config)
        states = [
            leaf.index_select(0, of_row).to(computed.dtype)
            for leaf, computed in zip(self._leaves, self._computed, strict=True)
        ]
        for number, (keys, values) in enumerate(zip(states[::2], states[1::2], strict=True)):
            cache.update(keys, values, number)
        return cache

    def backward(self) -> None:
        """Send the gradients that the passes' backward passes left on into what computed the openings."""
        reached = [
            (computed, leaf.grad.to(computed.dtype))
            for computed, leaf in zip(self._computed, self._leaves, strict=True)
            if leaf.grad is not None and computed.requires_grad
        ]
        if reached:
            torch.autograd.backward([computed for computed, _ in reached], [gradient for _, gradient in reached])


@dataclass(frozen=True)
class _EncodedPrefixBatch(PrefixBatch):
    encode_prefixes: EncodedPrefixes

    def cache_for_rows(self, forward: Callable[..., Any], config: PreTrainedConfig) -> Cache:
        return self.encode_prefixes.cache_for_rows(self.of_row, config)


def prefix_batch(openings: SharedPrefixes, pad_id: int, device: torch.device) -> PrefixBatch:
    """SharedPrefixes padded on the left."""
    ids, mask = left_padded(openings.ids, pad_id, device)
    return PrefixBatch(ids, mask, torch.tensor(openings.of_row, device=device))


def left_padded(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of ids padded on the left, and the mask that tells the padding, whose id may be a stop token's as well."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad_id] * (width - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids.long(), mask.long()


def right_padded(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Likewise, padded on the right."""
    ids, mask = left_padded([row[::-1] for row in rows], pad_id, device)
    return ids.flip(-1), mask.flip(-1)


def positions(mask: Tensor) -> Tensor:
    """(B, L) position ids of an attention mask: they count from 0 at the first position that is not padding."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def can_share(config: PreTrainedConfig) -> bool:
    """Whether a model's cache is plain keys and values in all layers, which rows can be picked from."""
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)
