"""Scores of completions, their standardisation, and how several sources become one score.

Shapes: N completions, S sources.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from align.data.chat import conversation_ids
from align.errors import AlignError
from align.records import Conversation
from align.rl.settings import ScoreBlock


class Reward(Protocol):
    """Scores completions of prompts: higher is better, one float a completion.

    One with `may_abstain` gives NaN for what it has no score for.
    """

    def __call__(self, prompts: Sequence[Conversation], completions: Sequence[str]) -> Tensor:
        """(B,) float32."""


class RewardModel:
    """A sequence classifier's score of a conversation, read at the token that ends the assistant's turn.

    Completions are taken as text and tokenized by the reward model's own tokenizer and template, exactly as in its
    training; so a reward model of another family works as well as one on the policy's trunk.

    Args:
        scores: of conversations as token ids, (B,).
        tokenizer: the reward model's.
        batch_size: conversations a pass.
        system_prompt: put before conversations that have none, as in the reward model's training.
    """

    def __init__(
        self,
        scores: Callable[[Sequence[Sequence[int]]], Tensor],
        tokenizer: Any,
        *,
        batch_size: int,
        system_prompt: str | None = None,
    ) -> None:
        self.scores = scores
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.system_prompt = system_prompt

    def __call__(self, prompts: Sequence[Conversation], completions: Sequence[str]) -> Tensor:
        rows = [self._ids(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
        result = torch.zeros(len(rows))
        for start in range(0, len(order), self.batch_size):
            group = order[start : start + self.batch_size]
            result[group] = self.scores([rows[row] for row in group]).float().cpu()
        return result

    def _ids(self, prompt: Conversation, completion: str) -> list[int]:
        opening, words = conversation_ids(self.tokenizer, prompt, completion, self.system_prompt)
        return [*opening, *words]


@dataclass
class RunningMoments:
    """Mean and variance of all values seen, updated a batch at a time (Chan et al. 1979, parallel variance)."""

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0

    def update(self, values: Tensor) -> None:
        """Take in a batch; pass that of all processes."""
        batch = values.double()
        count, mean = batch.numel(), float(batch.mean())
        delta, total = mean - self.mean, self.count + count
        self.squares += float((batch - mean).square().sum()) + delta**2 * self.count * count / total
        self.mean += delta * count / total
        self.count = total

    @property
    def std(self) -> float:
        """Population standard deviation; 1 before two values have been seen, or where they do not vary."""
        deviation = (self.squares / self.count) ** 0.5 if self.count > 1 else 0.0
        return deviation if deviation > 1e-8 else 1.0


def standardise(scores: Tensor, mean: float, std: float, clip: float | None) -> Tensor:
    """(score − mean) / std, kept within ±clip."""
    standard = (scores - mean) / std
    return standard if clip is None else standard.clamp(-clip, clip)


@dataclass
class RewardSource:
    """A source of scores: its weight among several, and its scores' moments where these are known beforehand.

    A gold source's scores are for reports: nothing is trained against them.
    """

    name: str
    reward: Reward
    weight: float = 1.0
    moments: tuple[float, float] | None = None
    gold: bool = False
    seen: RunningMoments = field(default_factory=RunningMoments)


class Rewards:
    """All sources of scores, and what becomes of these. The gold ones come last among the columns of scores."""

    def __init__(self, sources: Sequence[RewardSource], block: ScoreBlock) -> None:
        self.sources = sorted(sources, key=lambda source: source.gold)
        self.block = block
        self.trained = sum(not source.gold for source in sources)
        self.weights = torch.tensor([source.weight for source in self.sources[: self.trained]])

    @property
    def names(self) -> list[str]:
        """The sources', in the order of the columns of scores."""
        return [source.name for source in self.sources]

    def scores(self, prompts: Sequence[Conversation], completions: Sequence[str]) -> Tensor:
        """(N, S) scores as the sources give them."""
        return torch.stack([source.reward(prompts, completions).float() for source in self.sources], dim=1)

    def filled(self, scores: Tensor) -> tuple[Tensor, dict[str, float]]:
        """(N, S) scores in which what a source abstained from has the mean of what it scored, so that it moves nothing;
        and by name the share that each source that may abstain left unscored. Pass those of all processes.

        Raises:
            AlignError: a source scored nothing.
        """
        filled, shares = scores.clone(), {}
        for column, source in enumerate(self.sources):
            if not getattr(source.reward, "may_abstain", False):
                continue
            unscored = scores[:, column].isnan()
            if unscored.all():
                raise AlignError(
                    f"ppo.rewards: {source.name} scored none of {len(scores)} completions: no principle applies to "
                    "their prompts, or the judge abstained; look at the principles' `applies`, name another model in "
                    "`judge.engine`, or lower `judge.min_option_mass`"
                )
            filled[unscored, column] = scores[~unscored, column].mean()
            shares[source.name] = float(unscored.float().mean())
        return filled, shares

    def standardised(self, scores: Tensor) -> Tensor:
        """(N, trained) scores on one scale. Pass those of all processes: running moments take them in."""
        columns = []
        for source, column in zip(self.sources[: self.trained], scores.unbind(1), strict=False):
            mean, std = 0.0, 1.0
            if self.block.normalise == "held_out" and source.moments is not None:
                mean, std = source.moments
            elif self.block.normalise != "none":
                source.seen.update(column)
                mean, std = source.seen.mean, source.seen.std
            columns.append(standardise(column, mean, std, self.block.clip))
        return torch.stack(columns, dim=1)

    def combined(self, standardised: Tensor) -> Tensor:
        """(N,) one score a completion."""
        if self.block.combine == "minimum":
            return standardised.amin(dim=1)
        mean, spread = weighted_moments(standardised, self.weights)
        return mean - self.block.disagreement_coef * spread

    def state(self) -> dict[str, Any]:
        """What has to be kept to go on: JSON-able."""
        return {source.name: source.seen.__dict__ for source in self.sources}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        for source in self.sources:
            source.seen = RunningMoments(**state[source.name])


def weighted_moments(scores: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) means and standard deviations over the sources of (N, S) scores; weights (S,) are shares of their sum."""
    shares = weights / weights.sum()
    mean = scores @ shares
    return mean, ((scores - mean[:, None]).square() @ shares).sqrt()


def adapted_kl_coef(kl_coef: float, kl: float, target: float, completions: int, horizon: int) -> float:
    """The coefficient after a batch whose KL to the reference was `kl` nats a completion (Ziegler 2019, section 2.2).

    e = clip(kl / target − 1, ±0.2);  β ← β (1 + e · completions / horizon).
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * completions / horizon)
