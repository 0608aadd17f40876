"""One new token a row, after an opening that rows share: its keys and values are read once for all of them.

Attention over two sets of positions is their two results, weighted by the softmax mass of each: with log-sum-exps a and
b of the scores, out = out_a sigmoid(a - b) + out_b sigmoid(b - a) (Juravsky et al. 2024, Hydragen, eq. 4-5). Generation
on a CPU waits for keys and values more than for anything else, and the queries of all rows together make one product.

Shapes: B rows, H heads, K key-value heads, G = H / K heads that share one, S positions of a row's own, P of the
opening, D features a head.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from align.decoding.prefix_cache import CachedPrefix
from align.models import cpu_attention as attention
from align.models.wrappers import inner_model

NAME = "shared_opening"
LEAST = 32
"""Tokens of an opening from which on reading it once is worth the second product."""


@dataclass(frozen=True)
class _Shared:
    opening: CachedPrefix
    has_opening: Tensor
    """(B,) the rows that it comes before."""


_SHARED: ContextVar[_Shared] = ContextVar("shared opening")


def can_attend_to_prefix(model: Any, opening: CachedPrefix) -> bool:
    """Whether the model runs PyTorch's attention on a CPU, whose kernel also gives log-sum-exps.

    Its positions must be turned into queries and keys, as a bias of its own for every distance is not known here.
    """
    inner = inner_model(model)
    runs_kernel = inner.device.type == "cpu" and inner.config._attn_implementation in ("sdpa", attention.NAME)
    is_rotary = bool(getattr(inner.config, "rope_parameters", None))
    return runs_kernel and is_rotary and all(keys.shape == values.shape for keys, values in opening.states)


@contextmanager
def after_shared_prefix(config: Any, opening: CachedPrefix, has_opening: Tensor) -> Iterator[None]:
    """Within it, rows of one token attend to the opening before what their cache holds."""
    usual = config._attn_implementation
    token = _SHARED.set(_Shared(opening, has_opening))
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = usual
        _SHARED.reset(token)


def shared_prefix_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention of (B, H, 1, D) queries to (B, K, S, D) states of their own and to the opening's."""
    shared = _SHARED.get()
    keys, values = shared.opening.states[int(module.layer_idx)]  # type: ignore[arg-type]
    (batch, heads, _, size), groups = query.shape, key.shape[1]
    scale = scaling if scaling is not None else size**-0.5
    queries = query.reshape(batch, groups, -1, size)  # (B, K, G, D)
    own, own_mass = _attend(queries, key, value, _added(attention_mask, query.dtype), scale)
    together = queries.transpose(0, 1).reshape(1, groups, -1, size)  # (1, K, BG, D)
    first, first_mass = _attend(together, keys[None], values[None], None, scale)
    first = first.view(groups, batch, -1, size).transpose(0, 1)  # (B, K, G, D)
    first_mass = first_mass.view(groups, batch, -1).transpose(0, 1)  # (B, K, G)
    weight = torch.sigmoid(first_mass - own_mass) * shared.has_opening[:, None, None]
    merged = torch.lerp(own.float(), first.float(), weight[..., None]).to(query.dtype)
    return merged.reshape(batch, 1, heads, size), None


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """The result, and (B, K, queries) float32 log-sum-exps of the scores."""
    result, mass = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, False, attn_mask=mask, scale=scale
    )
    return result, mass


def _added(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A mask as what is added to the scores."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)


AttentionInterface.register(NAME, shared_prefix_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
