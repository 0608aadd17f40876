"""Prefill: prompts run through the model into a new cache, except for the tokens whose states are already cached.

Shapes: N rows, P positions of the longest cached part, L of the longest part to compute, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from align.decoding.cache import reserved_cache
from align.decoding.prefix_cache import CachedPrefix
from align.models.padding import right_padded


@dataclass(frozen=True)
class PrefillRow:
    """A prompt whose first `cached` tokens have their states in `prefix`."""

    prompt: Sequence[int]
    prefix: CachedPrefix | None
    cached: int

    @property
    def uncached(self) -> Sequence[int]:
        return self.prompt[self.cached :]


class Prefilled(NamedTuple):
    """A cache of rows [padding, cached, computed, padding], each row's columns, and (N, V) logits of next tokens."""

    cache: Cache
    columns: list[slice]
    logits: Tensor


def prefill_positions(rows: Sequence[PrefillRow]) -> int:
    """The positions of a prefill of these rows, padding and cached tokens included."""
    return len(rows) * (max(row.cached for row in rows) + max(len(row.uncached) for row in rows))


def prefill(
    forward: Callable[..., Any], config: PreTrainedConfig, rows: Sequence[PrefillRow], pad_id: int, device: torch.device
) -> Prefilled:
    """Run the uncached tokens of all rows through the model in one pass."""
    width = max(row.cached for row in rows)
    ids, mask = right_padded([row.uncached for row in rows], pad_id, device)
    cached = torch.tensor([row.cached for row in rows], device=device)
    cached_mask = torch.arange(width, device=device) >= width - cached[:, None]
    cache = _cache_with_prefixes(config, rows, width, ids.shape[1])
    ends, which = (mask.sum(-1) - 1).unique(return_inverse=True)
    logits = forward(
        ids,
        attention_mask=torch.cat([cached_mask.long(), mask], dim=1),
        position_ids=cached[:, None] + torch.arange(ids.shape[1], device=device),
        past_key_values=cache,
        logits_to_keep=ends,
    ).logits
    columns = [slice(width - row.cached, width + len(row.uncached)) for row in rows]
    return Prefilled(cache, columns, logits[torch.arange(len(rows), device=device), which])


def _cache_with_prefixes(config: PreTrainedConfig, rows: Sequence[PrefillRow], width: int, new: int) -> Cache:
    """A cache that holds each row's cached states, padded on the left to `width`, and has room for `new` more."""
    cache = reserved_cache(config, width + new)
    source = next((row.prefix for row in rows if row.prefix), None)
    if source is None:
        return cache
    while source.parent:
        source = source.parent
    for number, (layer, states) in enumerate(zip(cache.layers, source.states, strict=True)):
        keys, values = (each.new_zeros(len(rows), each.shape[0], width, each.shape[2]) for each in states)
        for index, row in enumerate(rows):
            if row.prefix:
                start = width - row.cached
                row.prefix.write(number, keys[index, :, start:], values[index, :, start:])
        layer.update(keys, values)
    return cache
