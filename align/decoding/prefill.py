"""Prompts read into a cache of their own, from the longest beginning on that is known of each.

Shapes: N rows, P positions of the longest known beginning, L of the longest rest, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from align.decoding.decode import reserved_cache
from align.decoding.prefix_cache import CachedPrefix
from align.decoding.shared_prefixes import right_padded


@dataclass(frozen=True)
class PrefillRow:
    """A prompt, of which the first `known` tokens are a prefix's."""

    prompt: Sequence[int]
    prefix: CachedPrefix | None
    known: int

    @property
    def rest(self) -> Sequence[int]:
        return self.prompt[self.known :]


class Read(NamedTuple):
    """A cache of N rows [padding, known beginning, rest, padding], where each row is in it, and (N, V) logits of the
    tokens that come next."""

    cache: Cache
    columns: list[slice]
    logits: Tensor


def pass_size(rows: Sequence[PrefillRow]) -> int:
    """Positions of a pass over these rows, padding included."""
    return len(rows) * (max(row.known for row in rows) + max(len(row.rest) for row in rows))


def read_prompts(
    forward: Callable[..., Any], config: PreTrainedConfig, rows: Sequence[PrefillRow], pad_id: int, device: torch.device
) -> Read:
    """Put the rows' rests through a model."""
    width = max(row.known for row in rows)
    ids, mask = right_padded([row.rest for row in rows], pad_id, device)
    known = torch.tensor([row.known for row in rows], device=device)
    before = torch.arange(width, device=device) >= width - known[:, None]
    cache = _cache_of_beginnings(config, rows, width, ids.shape[1])
    ends, which = (mask.sum(-1) - 1).unique(return_inverse=True)
    logits = forward(
        ids,
        attention_mask=torch.cat([before.long(), mask], dim=1),
        position_ids=known[:, None] + torch.arange(ids.shape[1], device=device),
        past_key_values=cache,
        logits_to_keep=ends,
    ).logits
    columns = [slice(width - row.known, width + len(row.rest)) for row in rows]
    return Read(cache, columns, logits[torch.arange(len(rows), device=device), which])


def _cache_of_beginnings(config: PreTrainedConfig, rows: Sequence[PrefillRow], width: int, rest: int) -> Cache:
    """A cache that holds what is known of each row, padded on the left, with room for the rest."""
    cache = reserved_cache(config, width + rest)
    source = next((row.prefix for row in rows if row.prefix), None)
    if source is None:
        return cache
    while source.parent:
        source = source.parent
    for number, (layer, (like, _)) in enumerate(zip(cache.layers, source.states, strict=True)):
        keys = like.new_zeros(len(rows), like.shape[0], width, like.shape[2])
        values = torch.zeros_like(keys)
        for index, row in enumerate(rows):
            if row.prefix:
                start = width - row.known
                row.prefix.write(number, keys[index, :, start:], values[index, :, start:])
        layer.update(keys, values)
    return cache
