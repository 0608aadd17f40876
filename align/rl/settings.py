"""The settings in a recipe's `ppo` block. Imports no tensor library."""

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

AboveZero = Annotated[Number, Field(gt=0)]
VALUE_SETTINGS = frozenset({"value", "value_coef", "value_clip_range", "gamma", "lam"})
OUTPUT_ADAPTED = (
    "model.lora.target_modules: ppo does not train an adapter on the output layer ({name}); leave it out, or set "
    "model.lora null to train all weights"
)
STOP_FIGURES = ("score", "reward", "score_length_controlled")
"""The figures that an early stop may follow, besides `score/<source>`."""


class ScoreBlock(Block):
    """How the sources' scores are standardised and combined into one.

    `running` standardises by the moments of a source's scores so far, over all processes. `held_out` uses the moments
    of the reward stage's scores on its held-out pairs, and treats other sources like `running`.
    """

    normalise: Literal["held_out", "running", "none"] = Field("held_out", description="how scores are standardised")
    clip: AboveZero | None = Field(5.0, description="scores stay in [-clip, clip]; null: no limit")
    combine: Literal["mean", "minimum"] = Field("mean", description="weighted mean or minimum of several sources")
    disagreement_coef: NonNegative = Field(
        0.0, description="weight of the sources' standard deviation, subtracted from their mean"
    )


class WatchBlock(Block):
    """When alarms fire. Each compares full windows of iterations, so that no single iteration fires one.

    An alarm has the name of its threshold's key; null turns it off.
    """

    window: Positive = Field(10, description="iterations in a window")
    repeat_after: Positive = Field(20, description="iterations before an alarm that persists is reported again")
    kl_limit: AboveZero | None = Field(50.0, description="highest KL to the reference (k1), nats per completion")
    kl_growth: Annotated[Number, Field(gt=1)] | None = Field(
        3.0, description="highest ratio of the KL to the window before, once it is above 5 nats per completion"
    )
    entropy_collapse: Fraction | None = Field(0.2, description="lowest entropy, as a share of the first window's")
    length_hacking: Fraction | None = Field(0.8, description="share of a clear rise of the score due to length")
    repetition_rise: Fraction | None = Field(
        0.1, description="largest clear rise of `repetition` since the first window"
    )
    gold_fall: Annotated[Number, Field(gt=0.5, le=1)] | None = Field(
        0.95, description="share of pairs of iterations between which a gold score fell while the score rose"
    )
    value_failure: Annotated[Number, Field(lt=1)] | None = Field(
        0.0, description="lowest explained variance of the returns, after value_warmup iterations"
    )
    value_warmup: Positive = Field(20, description="iterations before value_failure can fire")
    sampling_gap: AboveZero | None = Field(
        0.1, description="largest difference between the log-probs of sampling and training, nats per token"
    )
    stopped_fall: Fraction | None = Field(
        0.2, description="largest clear fall of `stopped_share` since the first window"
    )


class EarlyStopBlock(Block):
    """When a run stops early, and which policy it publishes. Decided by moving means."""

    figure: str = Field(
        "score", description="score, reward, score_length_controlled, or score/<source>: higher is better"
    )
    window: Positive = Field(5, description="iterations of the moving means")
    patience: Positive | None = Field(None, description="stop after this many iterations without a new best mean")
    kl_above: AboveZero | None = Field(
        None, description="stop once the mean KL to the reference (k1, nats per completion) is above this"
    )
    roll_back: bool = Field(True, description="publish the policy of the best checkpoint within kl_above, not the last")

    @model_validator(mode="after")
    def _does_something(self) -> "EarlyStopBlock":
        if self.patience is None and self.kl_above is None and not self.roll_back:
            raise ValueError("early_stop has no rule: set patience, kl_above or roll_back, or remove it")
        return self


class PpoBlock(Block):
    """Proximal policy optimisation. Each iteration completes `rollout_batch` prompts and trains on the completions."""

    iterations: Positive = Field(100, description="rounds of sampling and training")
    rollout_batch: Positive = Field(64, description="prompts per iteration, over all processes")
    completions_per_prompt: Positive = Field(1, description="siblings, which the critic-free advantages compare")
    epochs: Positive = Field(4, description="passes over each rollout batch")
    optimizer: OptimizerBlock = OptimizerBlock(learning_rate=1e-5, batch_size=64, micro_batch_size=8)
    sampling: SamplingBlock = SamplingBlock(max_new_tokens=128, temperature=1.0)
    max_prompt_tokens: Positive = Field(512, description="longer prompts are left out; the manifest counts them")
    advantage: Literal["gae", "leave_one_out", "group_relative"] = Field(
        "gae", description="estimated with a value model, or from the prompt's other completions"
    )
    value: Literal["adapter", "head"] = Field(
        "adapter", description="a separate adapter (without LoRA, a model), or a head on the policy's hidden states"
    )
    gamma: Fraction = Field(1.0, description="discount factor per token")
    lam: Fraction = Field(0.95, description="GAE's lambda (Schulman 2016)")
    clip_range: AboveZero = Field(0.2, description="clipping range of the policies' ratio (Schulman 2017)")
    value_clip_range: AboveZero | None = Field(0.2, description="clipping range around the old values; null: no limit")
    value_coef: NonNegative = Field(0.1, description="weight of the value loss")
    ptx_coef: NonNegative = Field(
        0.0, description="weight of the SFT loss on the sft stage's demonstrations (PPO-ptx, Ouyang 2022, eq. 2)"
    )
    kl_coef: NonNegative = Field(
        0.05, description="weight of the penalty on the KL to the reference (Ziegler 2019, section 2.2)"
    )
    kl_estimator: Literal["k1", "k2", "k3"] = Field(
        "k1",
        description="of the KL: k1 is subtracted from each token's reward (Ziegler 2019); k2 and k3 are added to the "
        "loss, each with its own gradient (k3: Shao 2024, eq. 4)",
    )
    kl_target: AboveZero | None = Field(
        None, description="KL that kl_coef is adapted to reach, nats per completion; null keeps kl_coef fixed"
    )
    kl_horizon: Positive = Field(
        10_000, description="completions over which kl_coef adapts; fewer than an iteration's count as those"
    )
    rewards: Annotated[tuple[RewardSourceBlock, ...], Field(min_length=1)] = Field(
        (RewardSourceBlock(stage="reward"),), description="where scores come from"
    )
    score: ScoreBlock = ScoreBlock()
    length_penalty: NonNegative = Field(0.0, description="subtracted from the score for each token of a completion")
    missing_eos_penalty: NonNegative = Field(
        1.0, description="subtracted from the score if the token limit cut a completion"
    )
    kl_to_old_limit: AboveZero | None = Field(
        None, description="end an iteration's updates once the KL to the sampling policy (k3, per token) exceeds this"
    )
    checkpoint_every: Positive = Field(5, description="iterations between resumable checkpoints")
    watch: WatchBlock = WatchBlock()
    sample_table_every: Positive | None = Field(
        10, description="iterations between tables of a few completions, in the terminal and in wandb; null: none"
    )
    early_stop: EarlyStopBlock | None = Field(
        None, description="when the run stops early, and whose policy it publishes"
    )

    @property
    def reads_reward_stage(self) -> bool:
        """Whether the recipe's reward stage is among the sources."""
        return any(source.stage is not None for source in self.rewards)

    @property
    def asks_judge(self) -> bool:
        """Whether the recipe's judge is among the sources."""
        return any(source.judge is not None for source in self.rewards)

    @property
    def kl_in_reward(self) -> bool:
        """Whether the KL penalty is part of the rewards; otherwise it is part of the loss."""
        return self.kl_estimator == "k1"

    @property
    def rows(self) -> int:
        """Completions per iteration, over all processes."""
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
            raise ValueError("kl_horizon has no effect unless kl_coef is adapted: set kl_target, or remove kl_horizon")
        if self.kl_target is not None and self.kl_coef == 0:
            raise ValueError("kl_coef 0 cannot be adapted to kl_target: set kl_coef above 0, or remove kl_target")
        if self.advantage == "gae" and self.value_coef == 0:
            raise ValueError(
                "value_coef 0 trains no value, which advantage gae relies on: set value_coef above 0, or advantage "
                "leave_one_out or group_relative"
            )
        names = [source.key for source in self.rewards]
        if len(set(names)) < len(names):
            raise ValueError(f"rewards: two sources have the same name ({', '.join(names)}); give each a `name`")
        if all(source.gold for source in self.rewards):
            raise ValueError("rewards: every source is gold, so there is nothing to train against; add one that is not")
        if self.early_stop is not None and self.early_stop.figure not in self._stop_figures:
            raise ValueError(
                f"early_stop.figure: there is no figure '{self.early_stop.figure}' to follow; choose one of "
                f"{', '.join(self._stop_figures)}"
            )
        if self.score.combine == "minimum" and any(source.weight != 1 for source in self.rewards):
            raise ValueError("rewards: the minimum uses no weights; remove them, or set score.combine to mean")
        if self.score.combine == "minimum" and self.score.disagreement_coef:
            raise ValueError("score.disagreement_coef needs the mean; remove it, or set score.combine to mean")
        if self.sampling.temperature == 0:
            raise ValueError("sampling.temperature must be above 0: a greedy policy explores nothing")
        if self.sampling.top_p < 1:
            raise ValueError("sampling.top_p must be 1: truncated sampling makes the importance ratios wrong")
        return self
