"""Attention for training on a CPU, where the backward pass of PyTorch's own kernel is slow on short rows.

Shapes: B rows, H heads, K key-value heads, G = H / K heads that share one, L query and S key positions, D features per
head.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

SHORT_ROWS_ATTENTION = "short_rows"
"""The name by which transformers knows this attention."""

MAX_SHORT_POSITIONS = 192
"""Key positions up to which plain products are faster than flash attention (`benchmarks/attention.py`)."""


class _PlainAttention(torch.autograd.Function):
    """softmax(s q kᵀ + mask) v (Vaswani et al. 2017, eq. 1), with one product for all heads that share keys."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float) -> Tensor:
        (batch, heads, length, size), shared = query.shape, key.shape[1]
        groups = batch * shared
        queries = query.reshape(groups, -1, size)  # (BK, GL, D)
        keys, values = key.reshape(groups, -1, size), value.reshape(groups, -1, size)  # (BK, S, D)
        scores = (queries @ keys.mT).float().mul_(scaling).view(batch, heads, length, -1)
        scores.masked_fill_(~mask, torch.finfo(torch.float32).min)
        weights = scores.softmax(-1).to(query.dtype).view(groups, -1, keys.shape[1])  # (BK, GL, S)
        ctx.save_for_backward(queries, keys, values, weights)
        ctx.scaling, ctx.shapes = scaling, (query.shape, key.shape)
        return (weights @ values).view(query.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        queries, keys, values, weights = ctx.saved_tensors
        of_query, of_key = ctx.shapes
        slope = gradient.reshape(queries.shape)
        weighted = (slope @ values.mT).mul_(weights)  # (BK, GL, S)
        of_scores = weighted.sub_(weights * weighted.sum(-1, keepdim=True)).mul_(ctx.scaling)
        return (
            (of_scores @ keys).view(of_query),
            (of_scores.mT @ queries).view(of_key),
            (weights.mT @ slope).view(of_key),
            None,
            None,
        )


def short_rows_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attention by plain products for short rows with gradients in bf16 on a CPU, else by PyTorch's kernel."""
    if not _is_short(query, key, attention_mask):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    scale = options.get("scaling") or query.shape[-1] ** -0.5
    return _PlainAttention.apply(query, key, value, attention_mask, scale).transpose(1, 2), None


def _is_short(query: Tensor, key: Tensor, mask: Tensor | None) -> bool:
    return (
        torch.is_grad_enabled()
        and query.device.type == "cpu"
        and query.dtype == torch.bfloat16
        and key.shape[2] <= MAX_SHORT_POSITIONS
        and mask is not None
        and mask.dtype == torch.bool
    )


def register_attention(name: str, attention: Callable[..., Any]) -> None:
    """Register an attention function with transformers. It gets the same masks as PyTorch's attention."""
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, sdpa_mask)


def use_cpu_attention(model: PreTrainedModel) -> None:
    """Switch a model from PyTorch's attention to `short_rows_attention`. Other attention is left as it is, and so are
    models that call their attention themselves instead of by its name."""
    if model.config._attn_implementation == "sdpa" and model.is_backend_compatible():
        register_attention(SHORT_ROWS_ATTENTION, short_rows_attention)
        model.set_attn_implementation(SHORT_ROWS_ATTENTION)
