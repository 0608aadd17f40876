"""Attention for decoding after a prefix that rows share, whose keys and values are read once for all rows.

Attention over two sets of positions is the sum of the two results, weighted by the softmax mass of each. With the
scores' log-sum-exps a and b, out = out_a sigmoid(a - b) + out_b sigmoid(b - a) (Juravsky et al. 2024, Hydragen, eq.
4-5). Decoding on a CPU is bound by reading keys and values, and the prefix's part of all rows is one matrix product.

Shapes: B rows, H heads, K key-value heads, G = H / K heads that share one, S positions of a row's own states, P of the
prefix, D features per head.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from align.decoding.prefix_cache import CachedPrefix
from align.models.cpu_attention import SHORT_ROWS_ATTENTION, register_attention
from align.models.wrappers import inner_model

SHARED_PREFIX_ATTENTION = "shared_prefix"
"""The name by which transformers knows this attention."""

MIN_PREFIX_TOKENS = 32
"""The length from which reading a prefix once saves more time than the second matrix product costs."""


_SHARED: ContextVar[tuple[CachedPrefix, Tensor]] = ContextVar("shared prefix")
"""The prefix, and (B,) whether each row begins with it."""


def can_attend_to_prefix(model: Any, prefix: CachedPrefix) -> bool:
    """Whether the model runs PyTorch's attention on a CPU, whose kernel also returns log-sum-exps.

    Positions must be encoded in queries and keys (RoPE). Models that add a bias for each distance are not supported,
    nor are those that call their attention themselves (Falcon): they would not see the prefix.
    """
    inner = inner_model(model)
    runs_kernel = inner.device.type == "cpu" and inner.config._attn_implementation in ("sdpa", SHORT_ROWS_ATTENTION)
    runs_kernel = runs_kernel and inner.is_backend_compatible()
    is_rotary = bool(getattr(inner.config, "rope_parameters", None))
    return runs_kernel and is_rotary and all(keys.shape == values.shape for keys, values in prefix.states)


@contextmanager
def attending_to_prefix(config: Any, prefix: CachedPrefix, has_prefix: Tensor) -> Iterator[None]:
    """Inside the context, queries of (B,) rows with the prefix attend to it as well as to the row's own states."""
    usual = config._attn_implementation
    token = _SHARED.set((prefix, has_prefix))
    config._attn_implementation = SHARED_PREFIX_ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = usual
        _SHARED.reset(token)


def shared_prefix_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attention of (B, H, 1, D) queries to the rows' own (B, K, S, D) states and to the prefix's."""
    (prefix, has_prefix), scaling = _SHARED.get(), options.get("scaling")
    keys, values = prefix.states[module.layer_idx]
    (batch, heads, _, size), groups = query.shape, key.shape[1]
    queries = query.reshape(batch, groups, -1, size)  # (B, K, G, D)
    own, own_mass = _attend(queries, key, value, _as_bias(attention_mask, query.dtype), scaling)
    of_all_rows = queries.transpose(0, 1).reshape(1, groups, -1, size)  # (1, K, BG, D)
    first, first_mass = _attend(of_all_rows, keys[None], values[None], None, scaling)
    first = first.view(groups, batch, -1, size).transpose(0, 1)  # (B, K, G, D)
    first_mass = first_mass.view(groups, batch, -1).transpose(0, 1)  # (B, K, G)
    weight = torch.sigmoid(first_mass - own_mass) * has_prefix[:, None, None]
    merged = torch.lerp(own.float(), first.float(), weight[..., None]).to(query.dtype)
    return merged.reshape(batch, 1, heads, size), None


def _attend(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scaling: float | None
) -> tuple[Tensor, Tensor]:
    """Attention with scores scaled by 1/√D by default, and (B, K, queries) float32 log-sum-exps of the scores."""
    result, mass = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, False, attn_mask=bias, scale=scaling
    )
    return result, mass


def _as_bias(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A boolean mask as a bias to add to the scores."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)


register_attention(SHARED_PREFIX_ATTENTION, shared_prefix_attention)
