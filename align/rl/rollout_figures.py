"""What PPO reports about a rollout: figures for `metrics.jsonl`, and one row per completion for `rollouts.jsonl`."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from align.figures.text_metrics import repetition
from align.records import as_dicts
from align.rl.advantages import explained_variance, groups_of_equals
from align.rl.experience import Experience
from align.rl.rewards import Rewards, weighted_moments
from align.rl.settings import PpoBlock


def rollout_figures(experience: Experience, rewards: Rewards, settings: PpoBlock) -> dict[str, float]:
    """Statistics over the completions of all processes; those of values or of siblings where there are some."""
    completions, count = experience.completions, len(experience.completions)
    return {
        **_score_figures(experience, rewards),
        "reward": float(experience.rewards.sum(dim=1).mean()),
        **{f"kl_to_reference_{name}": float(term.mean()) for name, term in experience.kl.items()},
        **_advantage_figures(experience, settings),
        "completion_length": int(experience.mask.sum()) / count,
        "stopped_share": sum(completion.stopped for completion in completions) / count,
        "answered_share": sum(completion.answered for completion in completions) / count,
        "repetition": sum(repetition(completion.text) for completion in completions) / count,
    }


def _score_figures(experience: Experience, rewards: Rewards) -> dict[str, float]:
    """The weighted mean score, its spread and its slope on length; with several sources, also each one's mean."""
    scores, _ = weighted_moments(experience.raw_scores[:, : rewards.trained], rewards.weights)
    lengths = experience.mask.sum(dim=1).double()
    figures = {
        "score": float(scores.mean()),
        "score_std": float(scores.std(correction=0)),
        "completion_length_std": float(lengths.std(correction=0)),
        "score_length_slope": least_squares_slope(lengths, scores),
    }
    if len(rewards.names) > 1:
        means = experience.raw_scores.mean(dim=0).tolist()
        figures |= {f"score/{name}": mean for name, mean in zip(rewards.names, means, strict=True)}
    figures |= {f"unscored/{name}": share for name, share in experience.unscored.items()}
    figures |= {f"prompts_cut/{name}": share for name, share in experience.cut.items()}
    if rewards.trained > 1:
        figures["score_disagreement"] = float(weighted_moments(experience.standardised, rewards.weights)[1].mean())
    return figures


def _advantage_figures(experience: Experience, settings: PpoBlock) -> dict[str, float]:
    """Statistics of per-token advantages before whitening, the largest after it, the values' explained variance, and
    the share of prompts whose completions have equal scores."""
    mask, values, returns = experience.mask, experience.values, experience.returns
    with_values = settings.advantage == "gae"
    unwhitened = (returns - values if with_values else experience.advantages)[mask]
    figures = {
        "advantage_mean": float(unwhitened.mean()),
        "advantage_std": float(unwhitened.std(correction=0)),
        "largest_advantage": float(experience.advantages[mask].abs().max()),
    }
    if with_values:
        figures["explained_variance"] = explained_variance(values, returns, mask)
    if settings.completions_per_prompt > 1:
        figures["uniform_groups"] = float(groups_of_equals(experience.scores, settings.rollout_batch).float().mean())
    return figures


def least_squares_slope(x: Tensor, y: Tensor) -> float:
    """Σ (x − x̄)(y − ȳ) / Σ (x − x̄)², both (N,); 0 if x does not vary."""
    x, y = x.double() - x.double().mean(), y.double() - y.double().mean()
    spread = float(x.square().sum())
    return float((x * y).sum()) / spread if spread else 0.0


def rollout_rows(
    experience: Experience, rewards: Rewards, iteration: int, provenance: str = ""
) -> Iterator[dict[str, Any]]:
    """Yields a JSON-able row per completion; `provenance` is the id of the entry that each names."""
    scores, _ = weighted_moments(experience.raw_scores[:, : rewards.trained], rewards.weights)
    for row, completion in enumerate(experience.completions):
        each = dict(zip(rewards.names, experience.raw_scores[row].tolist(), strict=True))
        yield {
            "iteration": iteration,
            "prompt_id": completion.prompt.prompt.id,
            "prompt": as_dicts(completion.prompt.prompt.prompt),
            "completion": completion.text,
            **({"thought": completion.thought} if completion.thought else {}),
            "score": float(scores[row]),
            **({"scores": each} if len(each) > 1 else {}),
            "kl_to_reference_k1": float(experience.kl["k1"][row]),
            "tokens": len(completion.tokens),
            "finish_reason": "stop" if completion.stopped else "length",
            "seed": completion.seed,
            "provenance": provenance,
        }
