"""PPO's losses: pure functions of tensors, each a SUM over tokens so that micro-batches add up to the whole batch.

Shapes: B completions, T completion tokens; `mask` True where a token counts. The caller divides by the number of tokens
of the whole minibatch over all processes; a mean of means would weight short micro-batches wrongly.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

LOG_RATIO_LIMIT = 20.0


@dataclass(frozen=True)
class PolicyLoss:
    """`loss` is differentiable; the rest are detached sums over the tokens that count."""

    loss: Tensor
    ratio: Tensor
    clipped: Tensor
    kl_to_old_k1: Tensor
    kl_to_old_k3: Tensor
    largest_log_ratio: Tensor


def clipped_policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip_range: float
) -> PolicyLoss:
    """Clipped surrogate objective (Schulman 2017, eq. 7), as a loss to minimise.

    −Σ min(ρA, clip(ρ, 1−ε, 1+ε)A) with ρ = exp(log π − log π_old), the exponent clamped to ±20.

    Args:
        logprobs: (B, T) under the policy being trained.
        old_logprobs: (B, T) under the policy that sampled, recomputed by the same pass.
        advantages: (B, T).
        mask: (B, T).
        clip_range: ε.
    """
    log_ratio = (logprobs - old_logprobs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    log_ratio = torch.where(mask, log_ratio, torch.zeros_like(log_ratio))
    ratio = log_ratio.exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    counts = mask.to(logprobs.dtype)
    with torch.no_grad():
        detached = log_ratio.detach()
        figures = {
            "ratio": (ratio * counts).sum(),
            "clipped": ((clipped > unclipped) & mask).sum(),
            "kl_to_old_k1": -(detached * counts).sum(),
            "kl_to_old_k3": ((torch.expm1(detached) - detached) * counts).sum(),
            "largest_log_ratio": detached.abs().max(),
        }
    loss = (torch.maximum(unclipped, clipped) * counts).sum()
    return PolicyLoss(loss, **{name: figure.detach() for name, figure in figures.items()})


@dataclass(frozen=True)
class ValueLoss:
    """`loss` is differentiable; `clipped` counts the tokens whose value was clipped."""

    loss: Tensor
    clipped: Tensor


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip_range: float
) -> ValueLoss:
    """Half the squared error, the value kept within clip_range of the old one (Huang 2022, detail 9).

    Σ ½ max((V − R)², (clip(V, V_old ± ε) − R)²).

    Args:
        values, old_values, returns: (B, T).
        mask: (B, T).
        clip_range: ε; infinity turns clipping off.
    """
    bounded = torch.minimum(torch.maximum(values, old_values - clip_range), old_values + clip_range)
    free, held = (values - returns).square(), (bounded - returns).square()
    counts = mask.to(values.dtype)
    loss = 0.5 * (torch.maximum(free, held) * counts).sum()
    return ValueLoss(loss, ((held > free) & mask).sum().detach())
