"""Per-token rewards, advantages and returns: pure functions of tensors.

Shapes: B completions in a batch, T completion tokens. `mask` is True on the tokens that the policy wrote, up to and
including the first stop token. They are contiguous from position 0. Log-probabilities are in nats.
"""

import torch
from torch import Tensor


def last_token_mask(mask: Tensor) -> Tensor:
    """(B, T) True at each completion's last unmasked token; nowhere for an empty completion."""
    following = torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], dim=1)
    return mask & ~following


def kl_terms(logprobs: Tensor, ref_logprobs: Tensor) -> dict[str, Tensor]:
    """Per-token estimators of KL(policy || reference) from the policy's samples (Schulman 2020, 'Approximating KL').

    With r = log π_ref − log π: k1 = −r (unbiased), k2 = r²/2 (low variance, biased), k3 = e^r − 1 − r (unbiased, never
    negative). r is clamped to ±20. As a penalty in the reward only k1 has the gradient of the KL, because the reward is
    not differentiated; `losses.reference_kl_loss` differentiates k2 and k3.

    Args:
        logprobs, ref_logprobs: (B, T).

    Returns:
        'k1', 'k2', 'k3', each (B, T).
    """
    log_ratio = (ref_logprobs - logprobs).clamp(-20.0, 20.0)
    return {"k1": -log_ratio, "k2": log_ratio.square() / 2, "k3": torch.expm1(log_ratio) - log_ratio}


def penalised_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """Per-token rewards: −kl_coef · kl, plus the score on each completion's last token (Ziegler 2019, eq. 2).

    Args:
        scores: (B,).
        kl: (B, T) log π − log π_ref (k1). Other estimators of the KL would give another gradient: with k3 it is
            ∇KL(π‖π_ref) − ∇KL(π_ref‖π), which leads away from the reference.
        mask: (B, T).

    Returns:
        (B, T), zero where masked.
    """
    rewards = torch.where(mask, -kl_coef * kl, torch.zeros_like(kl))
    return rewards + last_token_mask(mask) * scores[:, None]


def generalised_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation over each completion (Schulman 2016, eq. 16), with value 0 past its end.

    δ_t = r_t + γ V_{t+1} − V_t;  A_t = δ_t + γλ A_{t+1};  return_t = A_t + V_t.

    Args:
        rewards: (B, T).
        values: (B, T) V(s_t), the value before token t is written.
        mask: (B, T).
        gamma: discount per token, in [0, 1].
        lam: λ, in [0, 1].

    Returns:
        advantages and returns, each (B, T), zero where masked.

    Raises:
        ValueError: the shapes differ.
    """
    if not rewards.shape == values.shape == mask.shape:
        raise ValueError(
            f"rewards {tuple(rewards.shape)}, values {tuple(values.shape)} and mask {tuple(mask.shape)} "
            "must have the same shape"
        )
    counts = mask.to(values.dtype)
    values = values * counts
    advantages = torch.zeros_like(values)
    running = values.new_zeros(values.shape[0])
    next_value = torch.zeros_like(running)
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        running = (delta + gamma * lam * running) * counts[:, t]
        advantages[:, t] = running
        next_value = values[:, t]
    return advantages, (advantages + values) * counts


def leave_one_out_advantages(totals: Tensor, groups: int) -> Tensor:
    """REINFORCE leave-one-out: a completion's total reward minus its siblings' mean (Ahmadian 2024, eq. 8).

    Args:
        totals: (B,) each completion's summed reward. The k = B / groups completions of a prompt are adjacent.
        groups: number of prompts.

    Returns:
        (B,).

    Raises:
        ValueError: there are fewer than two completions per prompt, or B is not a multiple of groups.
    """
    grouped = _grouped(totals, groups)
    k = grouped.shape[1]
    others = (grouped.sum(dim=1, keepdim=True) - grouped) / (k - 1)
    return (grouped - others).flatten()


def group_relative_advantages(scores: Tensor, penalties: Tensor, groups: int) -> Tensor:
    """Scores standardised over each prompt's completions (Shao 2024, section 4.1.2), less the centred penalties.

    Only scores are standardised: divided by its own deviation, the noise of the KL would become the whole advantage of
    completions whose scores are alike. Scores that are all alike in a group give 0. The standard deviation is the
    population's, plus 1e-4.

    Args:
        scores: (B,). The k = B / groups completions of a prompt are adjacent.
        penalties: (B,) each completion's summed KL penalty; zero if the KL is in the loss.
        groups: number of prompts.

    Returns:
        (B,).

    Raises:
        ValueError: as in `leave_one_out_advantages`.
    """
    grouped, costs = _grouped(scores, groups), _grouped(penalties, groups)
    spread = grouped.std(dim=1, keepdim=True, correction=0) + 1e-4
    standardised = (grouped - grouped.mean(dim=1, keepdim=True)) / spread
    standardised *= ~groups_of_equals(scores, groups)[:, None]  # else rounding of the mean would be left
    return (standardised - (costs - costs.mean(dim=1, keepdim=True))).flatten()


def groups_of_equals(scores: Tensor, groups: int) -> Tensor:
    """(groups,) whether all completions of a prompt have the same score. Arguments: see `leave_one_out_advantages`."""
    grouped = _grouped(scores, groups)
    return grouped.amax(dim=1) == grouped.amin(dim=1)


def _grouped(totals: Tensor, groups: int) -> Tensor:
    if totals.numel() % groups or totals.numel() < 2 * groups:
        raise ValueError(
            f"{totals.numel()} completions of {groups} prompts: each prompt needs equally many, at least two"
        )
    return totals.view(groups, -1)


def whiten(values: Tensor, mask: Tensor) -> Tensor:
    """Shift and scale to zero mean and unit variance over the unmasked tokens; zero elsewhere.

    Pass the whole batch of all processes, or the result depends on how many processes there are. The variance is the
    population's; a batch without variance is only centred.
    """
    counts = mask.to(values.dtype)
    total = counts.sum().clamp(min=1)
    mean = (values * counts).sum() / total
    variance = ((values - mean).square() * counts).sum() / total
    return (values - mean) * torch.rsqrt(variance + 1e-8) * counts


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 − mean (returns − values)² / Var(returns) over the unmasked tokens; 0 if the returns do not vary.

    The squared error and not the residual's variance, so that values which are all too high or too low show.
    """
    residual, target = (returns - values)[mask], returns[mask]
    spread = target.var(correction=0) if target.numel() else torch.tensor(0.0)
    if spread <= 1e-12:
        return 0.0
    return float(1 - residual.square().mean() / spread)
