"""PPO's losses: pure functions of tensors, each a SUM over tokens so that micro-batches add up to the whole batch.

Shapes: B completions, T completion tokens; `mask` is False on padding. The caller divides by the minibatch's tokens
over all processes; a mean of the micro-batches' means would give tokens of short ones too much weight.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

LOG_RATIO_LIMIT = 20.0


class Loss(NamedTuple):
    """A differentiable loss, and detached figures: sums over the unmasked tokens; `largest_log_ratio` is a maximum."""

    loss: Tensor
    figures: dict[str, Tensor]


def clipped_policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip_range: float
) -> Loss:
    """Clipped surrogate objective (Schulman 2017, eq. 7), as a loss to minimise.

    −Σ min(ρA, clip(ρ, 1−ε, 1+ε)A) with ρ = exp(log π − log π_old), the exponent clamped to ±20.

    Args:
        logprobs: (B, T) under the policy being trained.
        old_logprobs: (B, T) under the policy that sampled.
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
    loss = (torch.maximum(unclipped, clipped) * counts).sum()
    with torch.no_grad():
        figures = {
            "policy_loss": loss.detach(),
            "ratio": (ratio * counts).sum(),
            "clip_fraction": ((clipped > unclipped) & mask).float().sum(),
            "kl_to_old_k1": -(log_ratio * counts).sum(),
            "kl_to_old_k3": ((torch.expm1(log_ratio) - log_ratio) * counts).sum(),
            "largest_log_ratio": log_ratio.abs().max(),
        }
    return Loss(loss, figures)


def reference_kl_loss(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, estimator: Literal["k2", "k3"]) -> Loss:
    """The KL to the reference as a loss, by an estimator that is differentiated itself.

    With r = log π_ref − log π of a token that π sampled, the expected gradient of k2 = Σ r²/2 is that of KL(π‖π_ref),
    and the gradient of k3 = Σ e^r − 1 − r (Shao 2024, eq. 4) is that of KL(π_ref‖π). Either is least where the two
    agree. In e^r, r is at most 20. k1 = −r has an expected gradient of zero, so it is no loss.

    Args:
        logprobs: (B, T) under the policy being trained.
        ref_logprobs: (B, T) under the reference.
        mask: (B, T).
    """
    log_ratio = torch.where(mask, ref_logprobs - logprobs, torch.zeros_like(logprobs))
    if estimator == "k2":
        loss = log_ratio.square().sum() / 2
    else:
        log_ratio = log_ratio.clamp(max=LOG_RATIO_LIMIT)
        loss = (torch.expm1(log_ratio) - log_ratio).sum()
    return Loss(loss, {"kl_loss": loss.detach()})


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip_range: float) -> Loss:
    """Half the squared error of the values, clipped around the old values (Huang 2022, detail 9).

    Σ ½ max((V − R)², (clip(V, V_old ± ε) − R)²).

    Args:
        values, old_values, returns: (B, T).
        mask: (B, T).
        clip_range: ε; infinity turns clipping off.
    """
    bounded = torch.minimum(torch.maximum(values, old_values - clip_range), old_values + clip_range)
    unclipped, clipped = (values - returns).square(), (bounded - returns).square()
    counts = mask.to(values.dtype)
    loss = 0.5 * (torch.maximum(unclipped, clipped) * counts).sum()
    clip_count = ((clipped > unclipped) & mask).float().sum()
    return Loss(loss, {"value_loss": loss.detach(), "value_clip_fraction": clip_count.detach()})
