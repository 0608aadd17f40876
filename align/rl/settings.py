"""PPO's settings, as a recipe's `ppo` block gives them. Imports no tensor library."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from align.config import (
    Block,
    Fraction,
    NonNegative,
    Number,
    OptimizerBlock,
    Positive,
    RewardSourceBlock,
    SamplingBlock,
)

VALUE_SETTINGS = frozenset({"value", "value_coef", "value_clip_range", "gamma", "lam"})


class ScoreBlock(Block):
    """What happens to the sources' scores before they become one reward.

    `held_out` standardises by mean and standard deviation of the reward stage's scores on its held-out pairs, and those
    of another source as `running` does: by those of all its scores seen so far, over all processes; `none` leaves them.
    """

    normalise: Literal["held_out", "running", "none"] = "held_out"
    clip: Annotated[Number, Field(gt=0)] | None = Field(5.0, description="scores stay in [-clip, clip]; null: no limit")
    combine: Literal["mean", "minimum"] = Field("mean", description="of several sources: mean by weight, or the least")
    disagreement_coef: NonNegative = Field(
        0.0, description="times the sources' standard deviation, taken from their mean (against over-optimisation)"
    )


class PpoBlock(Block):
    """Proximal policy optimisation. One iteration draws `rollout_batch` prompts and trains on what it wrote."""

    iterations: Positive = 100
    rollout_batch: Positive = Field(64, description="prompts an iteration, over all processes")
    completions_per_prompt: Positive = 1
    epochs: Positive = Field(4, description="passes over each rollout batch")
    optimizer: OptimizerBlock = OptimizerBlock(learning_rate=1e-5, batch_size=64, micro_batch_size=8)
    sampling: SamplingBlock = SamplingBlock(max_new_tokens=128, temperature=1.0)
    max_prompt_tokens: Positive = 512
    advantage: Literal["gae", "leave_one_out", "group_relative"] = "gae"
    value: Literal["adapter", "head"] = Field(
        "adapter", description="an adapter (or model) of its own, or a head on the policy's hidden states"
    )
    gamma: Fraction = 1.0
    lam: Fraction = 0.95
    clip_range: Annotated[Number, Field(gt=0)] = 0.2
    value_clip_range: Annotated[Number, Field(gt=0)] | None = 0.2
    value_coef: NonNegative = 0.1
    ptx_coef: NonNegative = Field(
        0.0, description="weight of the SFT loss on the sft stage's demonstrations (PPO-ptx, Ouyang 2022, eq. 2)"
    )
    kl_coef: NonNegative = Field(
        0.05, description="weight of the penalty for leaving the reference (Ziegler 2019, section 2.2)"
    )
    kl_estimator: Literal["k1", "k3"] = "k1"
    kl_target: Annotated[Number, Field(gt=0)] | None = Field(
        None, description="nats a completion that kl_coef is adapted to; null keeps it fixed"
    )
    kl_horizon: Positive = Field(10_000, description="completions over which kl_coef adapts")
    rewards: Annotated[tuple[RewardSourceBlock, ...], Field(min_length=1)] = (RewardSourceBlock(stage="reward"),)
    score: ScoreBlock = ScoreBlock()
    length_penalty: NonNegative = Field(0.0, description="taken from the score for each token of a completion")
    missing_eos_penalty: NonNegative = Field(1.0, description="taken from the score of a completion cut by the limit")
    kl_to_old_limit: Annotated[Number, Field(gt=0)] | None = Field(
        None, description="stop an iteration's updates once the approximate KL to the sampling policy exceeds this"
    )
    checkpoint_every: Positive = Field(5, description="iterations between resumable checkpoints")

    @property
    def reads_reward_stage(self) -> bool:
        """Whether the recipe's reward stage is among the sources."""
        return any(source.stage is not None for source in self.rewards)

    @property
    def rows(self) -> int:
        """Completions an iteration, over all processes."""
        return self.rollout_batch * self.completions_per_prompt

    @model_validator(mode="after")
    def _consistent(self) -> "PpoBlock":
        if self.rows % self.optimizer.batch_size:
            raise ValueError(
                f"optimizer.batch_size {self.optimizer.batch_size} must divide the iteration's completions "
                f"(rollout_batch x completions_per_prompt = {self.rows})"
            )
        if self.advantage != "gae" and self.completions_per_prompt < 2:
            raise ValueError(f"advantage {self.advantage} compares siblings: set completions_per_prompt to 2 or more")
        unused = sorted(VALUE_SETTINGS & self.model_fields_set) if self.advantage != "gae" else []
        if unused:
            raise ValueError(f"advantage {self.advantage} has no value model: remove {', '.join(unused)}")
        if self.kl_target is None and "kl_horizon" in self.model_fields_set:
            raise ValueError("kl_horizon is read only where kl_coef is adapted: set kl_target, or remove it")
        names = [source.key for source in self.rewards]
        if len(set(names)) < len(names):
            raise ValueError(f"rewards: two sources are called the same ({', '.join(names)}); give them a `name` each")
        if all(source.gold for source in self.rewards):
            raise ValueError("rewards: every source is gold, so there is nothing to train against; name another one")
        if self.score.combine == "minimum" and any(source.weight != 1 for source in self.rewards):
            raise ValueError("rewards: the minimum knows no weights; remove them, or set score.combine to mean")
        if self.score.combine == "minimum" and self.score.disagreement_coef:
            raise ValueError("score.disagreement_coef goes with the mean; remove it, or set score.combine to mean")
        if self.sampling.temperature == 0:
            raise ValueError("sampling.temperature must be above 0: a greedy policy explores nothing")
        if self.sampling.top_p < 1:
            raise ValueError("sampling.top_p must be 1: truncated sampling makes the importance ratios wrong")
        return self
