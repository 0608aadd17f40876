"""reward: train a reward model on preference pairs against their soft labels (Bai et al. 2022, section 4.1).

Part of the pairs is held out by prompt, and what the model says of them stands beside what the lengths alone would say.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from align.data.pairs import gather_pairs, mix_faults, pairs_by_source
from align.data.token_columns import pair_columns, whole_conversations
from align.errors import InputError
from align.records import Conversation, PreferencePair, as_dicts, digest, write_rows
from align.run.reproducibility import derive_seed
from align.run.stage import Context, Outcome, Stage
from align.run.tracking import METRICS, flatten_figures
from align.settings.blocks import HUMAN_SHARE, Block, Fraction, ModelBlock, Number, OptimizerBlock, PairSource, Positive
from align.training.held_out import HELD_OUT, ScoredPair, held_out_figures, print_held_out

SCALE_PAIRS = 1000
"""Training pairs that the scores' mean and spread are taken from where none are held out."""


class RewardBlock(Block):
    """The reward model."""

    ai: bool = Field(True, description="train on the pairs that the judge labelled")
    human: tuple[PairSource, ...] = Field((), description="preference pairs that people labelled")
    human_share: Annotated[Fraction, Field(gt=0, lt=1)] | None = Field(None, description=HUMAN_SHARE)
    base: Literal["sft", "model"] = Field("sft", description="start from the SFT policy, or from the base model")
    held_out: Annotated[Fraction, Field(lt=1)] = Field(0.1, description="share of the prompts whose pairs test it")
    optimizer: OptimizerBlock = Field(default_factory=OptimizerBlock)
    epochs: Annotated[Number, Field(gt=0)] = Field(1.0, description="passes over the pairs")
    max_length: Positive = Field(1024, description="tokens; longer pairs are left out and counted")
    trl: dict[str, Any] = Field(default_factory=dict, description="further options of trl.RewardConfig")


class Reward(Stage):
    """Trains a reward model on preference pairs and tests it on held-out ones."""

    name = "reward"
    help = "train a reward model on preference pairs"
    settings = RewardBlock
    shares = ("model",)
    outputs = ("model", "adapter", METRICS, HELD_OUT)

    def inputs(self, settings: RewardBlock) -> tuple[str, ...]:
        return (*(["sft"] if settings.base == "sft" else []), *(["compare"] if settings.ai else []))

    def files(self, settings: RewardBlock) -> tuple[str, ...]:
        return tuple(source.path for source in settings.human if Path(source.path).expanduser().exists())

    def check(self, settings: RewardBlock, shared: Mapping[str, Any]) -> list[str]:
        return mix_faults(self.name, settings.ai, settings.human, settings.human_share)

    def run(self, context: Context) -> Outcome:
        from align.models.loading import compute_dtype, load_tokenizer
        from align.run import processes
        from align.training.trainers import SoftLabelRewardTrainer, fit, load_scorer, pad_apart, score_pairs
        from align.training.trl_configs import RewardConfig, training_config

        settings: RewardBlock = context.settings
        block: ModelBlock = context.shared["model"]
        dtype = compute_dtype(block.precision)
        config = training_config(RewardConfig, context, dtype, max_length=None, disable_dropout=True)
        path, revision = block.path, block.revision
        if settings.base == "sft":
            path, revision = str(context.inputs["sft"] / "model"), None
        tokenizer = pad_apart(load_tokenizer(path, revision=revision, trust_remote_code=block.trust_remote_code))
        counts: Counter[str] = Counter()
        ai = context.inputs["compare"] / "pairs.jsonl" if settings.ai else None
        gathered = gather_pairs(ai, settings.human, counts, settings.human_share)
        training, held_out = split_by_prompt(gathered, settings.held_out)
        columns = pair_columns(tokenizer, training, settings.max_length, block.system_prompt)
        tested = pair_columns(tokenizer, held_out, settings.max_length, block.system_prompt)
        too_long = [*columns.too_long, *tested.too_long]
        counts.update(pairs=len(columns), pairs_held_out=len(tested), pairs_too_long=len(too_long))
        if not columns.rows:
            raise InputError(f"reward: no pair to train on; {dict(counts)}. Raise `max_length` or lower `held_out`")

        model = load_scorer(path, block, dtype, config.seed, revision)
        rows = whole_conversations(columns).rows
        trainer, trained = fit(SoftLabelRewardTrainer, context, model, tokenizer, config, rows, dtype)
        scores = score_pairs(trainer, whole_conversations(tested).rows)
        scored = _scored([pair for pair in held_out if pair.id not in tested.too_long], scores)
        measured = held_out_figures(scored, derive_seed(context.seed, self.name, "bootstrap"))
        scale = scale_figures(scores or score_pairs(trainer, rows[:SCALE_PAIRS]))
        if processes.is_first():
            write_rows(context.output / HELD_OUT, scored)
            with context.tracker() as tracker:
                tracker.log(trained.steps + 1, flatten_figures({"held_out": measured, **scale}))
            print_held_out(measured, context.run_name)
        sources = {"training": pairs_by_source(training), "held_out": pairs_by_source(held_out)}
        figures = {"base": settings.base, **scale, **measured, "pairs_too_long": too_long, "pairs_by_source": sources}
        return Outcome({**counts, "steps": trained.steps}, {**figures, "last_step": dict(trained.figures)})


def prompt_id(prompt: Conversation) -> str:
    """Identity of a prompt by its content."""
    return digest(as_dicts(prompt))


def split_by_prompt(
    pairs: Sequence[PreferencePair], held_out: float
) -> tuple[list[PreferencePair], list[PreferencePair]]:
    """(pairs to train on, pairs held out). A hash of the prompt decides, so no prompt is on both sides, ever."""
    sides: tuple[list[PreferencePair], list[PreferencePair]] = ([], [])
    for pair in pairs:
        sides[is_held_out(pair.prompt, held_out)].append(pair)
    return sides


def is_held_out(prompt: Conversation, share: float) -> bool:
    """Whether a prompt is among the `share` of all prompts whose pairs test the reward model."""
    return int(digest(["held out", prompt_id(prompt)], 8), 16) / 16**8 < share


def scale_figures(scores: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Mean and standard deviation over chosen and rejected completions, which PPO centres its rewards by."""
    import numpy as np

    return {"score_mean": float(np.mean(scores)), "score_std": float(np.std(scores))}


def _scored(pairs: Sequence[PreferencePair], scores: Sequence[tuple[float, float]]) -> list[ScoredPair]:
    return [
        ScoredPair(
            id=pair.id,
            prompt_id=prompt_id(pair.prompt),
            probability=pair.probability,
            chosen_score=chosen,
            rejected_score=rejected,
            chosen_characters=len(pair.chosen[-1].content),
            rejected_characters=len(pair.rejected[-1].content),
            source=pair.source,
            category=pair.category,
        )
        for pair, (chosen, rejected) in zip(pairs, scores, strict=True)
    ]


STAGE = Reward()
