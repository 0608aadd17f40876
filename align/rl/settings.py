"""PPO's settings, as a recipe's `ppo` block gives them. Imports no tensor library."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from align.settings.blocks import (
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
STOP_FIGURES = ("score", "reward", "score_length_controlled")
"""What an early stop may look at, besides `score/<source>`."""


class ScoreBlock(Block):
    """What happens to the sources' scores before they become one reward.

    `held_out` standardises by mean and standard deviation of the reward stage's scores on its held-out pairs, and those
    of another source as `running` does: by those of all its scores seen so far, over all processes; `none` leaves them.
    """

    normalise: Literal["held_out", "running", "none"] = Field("held_out", description="by what scores are standardised")
    clip: Annotated[Number, Field(gt=0)] | None = Field(5.0, description="scores stay in [-clip, clip]; null: no limit")
    combine: Literal["mean", "minimum"] = Field("mean", description="of several sources: mean by weight, or the least")
    disagreement_coef: NonNegative = Field(
        0.0, description="times the sources' standard deviation, taken from their mean (against over-optimisation)"
    )


class WatchBlock(Block):
    """When an alarm fires. Each compares medians or pairs of whole windows, so that no single iteration fires one.

    An alarm has the name of the key that is its threshold; null turns it off.
    """

    window: Positive = Field(10, description="iterations that are looked at together")
    repeat_after: Positive = Field(20, description="iterations before an alarm that holds on is told again")
    kl_limit: Annotated[Number, Field(gt=0)] | None = Field(
        50.0, description="KL to the reference (k1), nats a completion"
    )
    kl_growth: Annotated[Number, Field(gt=1)] | None = Field(
        3.0, description="the KL as a multiple of the window before, once it is above 5 nats a completion"
    )
    entropy_collapse: Fraction | None = Field(0.2, description="entropy as a share of the first window's")
    length_hacking: Fraction | None = Field(
        0.8, description="share of a clear rise of the score that is gone at equal length"
    )
    repetition_rise: Fraction | None = Field(0.1, description="above the first window's repetition")
    gold_fall: Annotated[Number, Field(gt=0.5, le=1)] | None = Field(
        0.95,
        description="share of the pairs of an earlier and a new iteration in which a gold score fell, the score rising",
    )
    value_failure: Annotated[Number, Field(lt=1)] | None = Field(
        0.0, description="explained variance of the returns below this, after value_warmup iterations"
    )
    value_warmup: Positive = Field(20, description="iterations before value_failure is looked at")
    sampling_gap: Annotated[Number, Field(gt=0)] | None = Field(
        0.1, description="nats a token between the log-probs of sampling and of training"
    )
    stopped_fall: Fraction | None = Field(0.2, description="below the first window's share ended by a stop token")


class EarlyStopBlock(Block):
    """When a run ends before its iterations do, and whose policy it leaves. Looks at means over moving windows."""

    figure: str = Field(
        "score", description="score, reward, score_length_controlled, or score/<source>: higher is better"
    )
    window: Positive = Field(5, description="iterations of the moving means")
    patience: Positive | None = Field(None, description="stop after so many iterations without a new best mean")
    kl_above: Annotated[Number, Field(gt=0)] | None = Field(
        None, description="stop once the mean KL to the reference (k1, nats a completion) is above this"
    )
    roll_back: bool = Field(True, description="end with the best checkpoint's policy, within kl_above, not the last")

    @model_validator(mode="after")
    def _does_something(self) -> "EarlyStopBlock":
        if self.patience is None and self.kl_above is None and not self.roll_back:
            raise ValueError("early_stop has no rule: set patience, kl_above or roll_back, or remove it")
        return self


class PpoBlock(Block):
    """Proximal policy optimisation. One iteration draws `rollout_batch` prompts and trains on what it wrote."""

    iterations: Positive = Field(100, description="rounds of sampling and training")
    rollout_batch: Positive = Field(64, description="prompts an iteration, over all processes")
    completions_per_prompt: Positive = Field(1, description="siblings, which the critic-free advantages compare")
    epochs: Positive = Field(4, description="passes over each rollout batch")
    optimizer: OptimizerBlock = OptimizerBlock(learning_rate=1e-5, batch_size=64, micro_batch_size=8)
    sampling: SamplingBlock = SamplingBlock(max_new_tokens=128, temperature=1.0)
    max_prompt_tokens: Positive = Field(512, description="longer prompts are left out and counted")
    advantage: Literal["gae", "leave_one_out", "group_relative"] = Field(
        "gae", description="from a value model, or from a prompt's other completions"
    )
    value: Literal["adapter", "head"] = Field(
        "adapter", description="an adapter (or model) of its own, or a head on the policy's hidden states"
    )
    gamma: Fraction = Field(1.0, description="discount a token")
    lam: Fraction = Field(0.95, description="GAE's lambda (Schulman 2016)")
    clip_range: Annotated[Number, Field(gt=0)] = Field(0.2, description="of the policies' ratio (Schulman 2017)")
    value_clip_range: Annotated[Number, Field(gt=0)] | None = Field(
        0.2, description="of values around those when sampled; null: no limit"
    )
    value_coef: NonNegative = Field(0.1, description="weight of the value loss")
    ptx_coef: NonNegative = Field(
        0.0, description="weight of the SFT loss on the sft stage's demonstrations (PPO-ptx, Ouyang 2022, eq. 2)"
    )
    kl_coef: NonNegative = Field(
        0.05, description="weight of the penalty for leaving the reference (Ziegler 2019, section 2.2)"
    )
    kl_estimator: Literal["k1", "k3"] = Field("k1", description="of the penalty; k3 is never negative (Schulman 2020)")
    kl_target: Annotated[Number, Field(gt=0)] | None = Field(
        None, description="nats a completion that kl_coef is adapted to; null keeps it fixed"
    )
    kl_horizon: Positive = Field(10_000, description="completions over which kl_coef adapts")
    rewards: Annotated[tuple[RewardSourceBlock, ...], Field(min_length=1)] = Field(
        (RewardSourceBlock(stage="reward"),), description="where scores come from"
    )
    score: ScoreBlock = ScoreBlock()
    length_penalty: NonNegative = Field(0.0, description="taken from the score for each token of a completion")
    missing_eos_penalty: NonNegative = Field(1.0, description="taken from the score of a completion cut by the limit")
    kl_to_old_limit: Annotated[Number, Field(gt=0)] | None = Field(
        None, description="stop an iteration's updates once the approximate KL to the sampling policy exceeds this"
    )
    checkpoint_every: Positive = Field(5, description="iterations between resumable checkpoints")
    watch: WatchBlock = WatchBlock()
    sample_table_every: Positive | None = Field(
        10, description="iterations between tables of a few completions, on the console and in wandb; null: none"
    )
    early_stop: EarlyStopBlock | None = Field(None, description="when the run ends early, and whose policy it leaves")

    @property
    def reads_reward_stage(self) -> bool:
        """Whether the recipe's reward stage is among the sources."""
        return any(source.stage is not None for source in self.rewards)

    @property
    def asks_judge(self) -> bool:
        """Whether the recipe's judge is among the sources."""
        return any(source.judge is not None for source in self.rewards)

    @property
    def rows(self) -> int:
        """Completions an iteration, over all processes."""
        return self.rollout_batch * self.completions_per_prompt

    @property
    def _stop_figures(self) -> tuple[str, ...]:
        each = (f"score/{source.key}" for source in self.rewards) if len(self.rewards) > 1 else ()
        return (*STOP_FIGURES, *each)

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
        if self.kl_target is None and self.kl_horizon != type(self).model_fields["kl_horizon"].default:
            raise ValueError("kl_horizon is read only where kl_coef is adapted: set kl_target, or remove it")
        names = [source.key for source in self.rewards]
        if len(set(names)) < len(names):
            raise ValueError(f"rewards: two sources are called the same ({', '.join(names)}); give them a `name` each")
        if all(source.gold for source in self.rewards):
            raise ValueError("rewards: every source is gold, so there is nothing to train against; name another one")
        if self.early_stop is not None and self.early_stop.figure not in self._stop_figures:
            raise ValueError(
                f"early_stop.figure: there is no figure '{self.early_stop.figure}' to stop by; there are "
                f"{', '.join(self._stop_figures)}"
            )
        if self.score.combine == "minimum" and any(source.weight != 1 for source in self.rewards):
            raise ValueError("rewards: the minimum knows no weights; remove them, or set score.combine to mean")
        if self.score.combine == "minimum" and self.score.disagreement_coef:
            raise ValueError("score.disagreement_coef goes with the mean; remove it, or set score.combine to mean")
        if self.sampling.temperature == 0:
            raise ValueError("sampling.temperature must be above 0: a greedy policy explores nothing")
        if self.sampling.top_p < 1:
            raise ValueError("sampling.top_p must be 1: truncated sampling makes the importance ratios wrong")
        return self
