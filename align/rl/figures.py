"""What an iteration of PPO reports of its rollout: figures for the metrics, and a row a completion."""

from collections.abc import Iterator
from typing import Any

from align.metrics import repetition
from align.records import as_dicts
from align.rl.advantages import explained_variance
from align.rl.experience import Experience
from align.rl.rewards import Rewards, weighted_moments


def rollout_figures(experience: Experience, rewards: Rewards) -> dict[str, float]:
    """Means over the completions, all processes' together."""
    mask, completions = experience.mask, experience.completions
    count = len(completions)
    return {
        **_score_figures(experience, rewards),
        "reward": float(experience.rewards.sum(dim=1).mean()),
        **{f"kl_to_reference_{name}": float(term.mean()) for name, term in experience.kl.items()},
        "explained_variance": explained_variance(experience.values, experience.returns, mask),
        "advantage_std": float(experience.advantages[mask].std(correction=0)),
        "completion_length": int(mask.sum()) / count,
        "stopped_share": sum(completion.stopped for completion in completions) / count,
        "repetition": sum(repetition(completion.text) for completion in completions) / count,
    }


def _score_figures(experience: Experience, rewards: Rewards) -> dict[str, float]:
    """The mean score by the sources' weights and its spread; with several sources, each one's, and their discord."""
    scores, _ = weighted_moments(experience.raw_scores[:, : rewards.trained], rewards.weights)
    figures = {"score": float(scores.mean()), "score_std": float(scores.std(correction=0))}
    if len(rewards.names) > 1:
        means = experience.raw_scores.mean(dim=0).tolist()
        figures |= {f"score/{name}": mean for name, mean in zip(rewards.names, means, strict=True)}
    if rewards.trained > 1:
        figures["score_disagreement"] = float(weighted_moments(experience.standardised, rewards.weights)[1].mean())
    return figures


def rollout_rows(experience: Experience, rewards: Rewards, iteration: int) -> Iterator[dict[str, Any]]:
    """A JSON-able row a completion."""
    scores, _ = weighted_moments(experience.raw_scores[:, : rewards.trained], rewards.weights)
    for row, completion in enumerate(experience.completions):
        each = dict(zip(rewards.names, experience.raw_scores[row].tolist(), strict=True))
        yield {
            "iteration": iteration,
            "prompt_id": completion.prompt.prompt.id,
            "prompt": as_dicts(completion.prompt.prompt.prompt),
            "completion": completion.text,
            "score": float(scores[row]),
            **({"scores": each} if len(each) > 1 else {}),
            "kl_to_reference_k1": float(experience.kl["k1"][row]),
            "tokens": len(completion.tokens),
            "finish_reason": "stop" if completion.stopped else "length",
        }
