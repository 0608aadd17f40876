"""Scores completions by one or more sources, standardises the scores, and combines them into one.

Shapes: N completions, S sources.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from align.errors import AlignError
from align.records import Conversation
from align.rl.settings import ScoreBlock


@dataclass(frozen=True)
class Response:
    """What a policy wrote after a prompt.

    Args:
        answer: the text that it says (`align.data.answers`); rewards that read text read this.
        finished: the policy ended its turn; otherwise the limit cut it.
        answered: False if only a thought was written, or less. It gets no score.
        prompt_ids, token_ids: what the policy read and wrote, its thought and stop token included. Rewards that read
            the policy's own tokens read these.
    """

    prompt: Conversation
    answer: str
    finished: bool = True
    answered: bool = True
    prompt_ids: Sequence[int] = ()
    token_ids: Sequence[int] = ()


class Reward(Protocol):
    """Scores responses, one float for each; higher is better.

    A reward whose attribute `may_abstain` is true gives NaN where it has no score. One whose attribute `passes_all` is
    true is shown responses without an answer too.
    """

    def __call__(self, responses: Sequence[Response]) -> Tensor:
        """(B,) float32."""


@dataclass(frozen=True)
class RewardModel:
    """A reward stage's model, whose score of a conversation is read at its last token: the end of the assistant's turn.

    It was trained from the policy's base model with the same tokenizer, so it reads the policy's own tokens. Rendering
    their text again could make other tokens: a template may rewrite a thought, and ends a turn that the limit cut.

    Args:
        scores: maps B conversations, as token ids, to (B,) scores.
        batch_size: conversations per pass.
    """

    passes_all: ClassVar[bool] = True
    """With sharded weights, every process has to make equally many passes."""

    scores: Callable[[Sequence[Sequence[int]]], Tensor]
    batch_size: int

    def __call__(self, responses: Sequence[Response]) -> Tensor:
        rows = [[*response.prompt_ids, *response.token_ids] for response in responses]
        return score_by_length(self.scores, rows, [len(row) for row in rows], self.batch_size)


def score_by_length(
    score: Callable[[list[Any]], Tensor], rows: Sequence[Any], lengths: Sequence[int], batch_size: int
) -> Tensor:
    """(N,) scores of rows, on the CPU in float32. Batches have rows of similar length, so that little is padding."""
    order = sorted(range(len(rows)), key=lambda row: lengths[row])
    result = torch.zeros(len(rows))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        result[batch] = score([rows[row] for row in batch]).float().cpu()
    return result


def nan_as_infinity(scores: Tensor) -> Tensor:
    """Scores of a model that does not abstain. NaN would count as an abstention; infinity is reported as a fault."""
    return scores.masked_fill(scores.isnan(), torch.inf)


@dataclass
class RunningMoments:
    """Mean and variance of all values seen, updated batch by batch (Chan et al. 1979, parallel variance)."""

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0

    def update(self, values: Tensor) -> None:
        """Add the values of a batch. Pass the batch of all processes."""
        batch = values.double()
        if not batch.numel():
            return
        count, mean = batch.numel(), float(batch.mean())
        delta, total = mean - self.mean, self.count + count
        self.squares += float((batch - mean).square().sum()) + delta**2 * self.count * count / total
        self.mean += delta * count / total
        self.count = total

    @property
    def std(self) -> float:
        """Population standard deviation; 1 before two values have been seen, or if they do not vary."""
        deviation = (self.squares / self.count) ** 0.5 if self.count > 1 else 0.0
        return deviation if deviation > 1e-8 else 1.0


def standardise(scores: Tensor, mean: float, std: float, clip: float | None) -> Tensor:
    """(score − mean) / std, kept within ±clip."""
    standardised = (scores - mean) / std
    return standardised if clip is None else standardised.clamp(-clip, clip)


@dataclass
class RewardSource:
    """A source of scores.

    Args:
        weight: in the weighted mean of several sources.
        moments: mean and standard deviation of its scores, if known beforehand.
        gold: its scores are only reported; nothing is trained against them.
        seen: moments of its scores so far.
    """

    name: str
    reward: Reward
    weight: float = 1.0
    moments: tuple[float, float] | None = None
    gold: bool = False
    seen: RunningMoments = field(default_factory=RunningMoments)

    def neutral(self, scored: Tensor) -> float:
        """The score of a completion that has none, given the batch's others.

        Raises:
            AlignError: there are no others, and no mean is known.
        """
        if scored.numel():
            return float(scored.mean())
        if self.seen.count or self.moments:
            return self.seen.mean if self.seen.count else self.moments[0]  # type: ignore[index]
        raise AlignError(
            f"ppo.rewards: {self.name} scored no completion: the limit cut every thought (raise "
            "ppo.sampling.max_new_tokens), no principle applies to their prompts (check the principles' `applies`), or "
            "the judge abstained (choose another model in `judge.engine`, or lower `judge.min_option_mass`)"
        )


def may_abstain(reward: Reward) -> bool:
    """Whether NaN among a reward's scores means that it has none."""
    return bool(getattr(reward, "may_abstain", False))


class Rewards:
    """The sources of scores, and how their scores become one. Gold sources come last among the columns of scores."""

    def __init__(self, sources: Sequence[RewardSource], block: ScoreBlock) -> None:
        self.sources = sorted(sources, key=lambda source: source.gold)
        self.block = block
        self.trained = sum(not source.gold for source in sources)
        self.weights = torch.tensor([source.weight for source in self.sources[: self.trained]])

    @property
    def names(self) -> list[str]:
        """The sources' names, in the order of the columns of scores."""
        return [source.name for source in self.sources]

    def scores(self, responses: Sequence[Response]) -> Tensor:
        """(N, S) raw scores: NaN where a source abstained or nothing was answered, infinite where it is broken."""
        scores = torch.full((len(responses), len(self.sources)), torch.nan)
        answered = [row for row, response in enumerate(responses) if response.answered]
        for column, source in enumerate(self.sources):
            asked = range(len(responses)) if getattr(source.reward, "passes_all", False) else answered
            if asked:
                given = source.reward([responses[row] for row in asked]).float()
                scores[asked, column] = given if may_abstain(source.reward) else nan_as_infinity(given)
        scores[[row for row, response in enumerate(responses) if not response.answered]] = torch.nan
        return scores

    def cut(self) -> dict[str, int]:
        """By name, how many prompts each source had to shorten in this process since the last call."""
        counted = {source.name: source.reward for source in self.sources if hasattr(source.reward, "take_cut")}
        return {name: reward.take_cut() for name, reward in counted.items()}

    def fill_unscored(self, scores: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Replace a source's missing scores by the mean of its others, which is neutral. Pass all processes' scores.

        Where there are no others, the mean is that of the source's earlier scores, or of the held-out pairs.

        Returns:
            (N, S) scores, and by name the share of completions that each source that may abstain left unscored.

        Raises:
            AlignError: a source scored nothing, and no mean of its scores is known.
        """
        filled, shares = scores.clone(), {}
        for column, source in enumerate(self.sources):
            unscored = scores[:, column].isnan()
            if unscored.any():
                filled[unscored, column] = source.neutral(scores[~unscored, column])
            if unscored.any() or may_abstain(source.reward):
                shares[source.name] = float(unscored.float().mean())
        return filled, shares

    def standardised(self, scores: Tensor, scored: Tensor | None = None) -> Tensor:
        """(N, trained sources) scores on one scale. Pass all processes' scores, because they update running moments.

        Args:
            scores: (N, S), without gaps.
            scored: (N, S) False where a source abstained: the mean that stands there would lower the moments' spread.
        """
        scored = torch.ones_like(scores, dtype=torch.bool) if scored is None else scored
        columns = []
        for index, source in enumerate(self.sources[: self.trained]):
            column = scores[:, index]
            mean, std = 0.0, 1.0
            if self.block.normalise == "held_out" and source.moments is not None:
                mean, std = source.moments
            elif self.block.normalise != "none":
                source.seen.update(column[scored[:, index]])
                mean, std = source.seen.mean, source.seen.std
            columns.append(standardise(column, mean, std, self.block.clip))
        return torch.stack(columns, dim=1)

    def combined(self, standardised: Tensor) -> Tensor:
        """(N,) one score per completion."""
        if self.block.combine == "minimum":
            return standardised.amin(dim=1)
        mean, spread = weighted_moments(standardised, self.weights)
        return mean - self.block.disagreement_coef * spread

    def state(self) -> dict[str, Any]:
        """The running moments that a checkpoint saves: JSON-able."""
        return {source.name: source.seen.__dict__ for source in self.sources}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        for source in self.sources:
            source.seen = RunningMoments(**state[source.name])


def weighted_moments(scores: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) weighted means and standard deviations of (N, S) scores over the sources; weights (S,) are normalised."""
    shares = weights / weights.sum()
    mean = scores @ shares
    return mean, ((scores - mean[:, None]).square() @ shares).sqrt()


def adapted_kl_coef(kl_coef: float, kl: float, target: float, completions: int, horizon: int) -> float:
    """The KL coefficient after a batch whose KL was `kl` nats per completion (Ziegler 2019, section 2.2).

    e = clip(kl / target − 1, ±0.2);  β ← β (1 + e · min(completions / horizon, 1)).

    The paper's horizon is longer than a batch. A shorter one counts as one batch, or β could become negative; so one
    batch changes β by at most a fifth.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * min(completions / horizon, 1.0))
