"""reward: train a reward model on preference pairs against their soft labels (Bai et al. 2022, section 4.1).

The pairs of some prompts are held out. The model's accuracy on them is reported beside that of preferring the shorter
or the longer completion.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from align.data.pair_mixing import pairs_by_source
from align.data.sources import LEFT_OUT, open_intake
from align.data.token_columns import keep_left_out, pair_columns, whole_conversations
from align.errors import InputError
from align.records import Conversation, PreferencePair, as_dicts, digest, write_rows
from align.run.reproducibility import derive_seed
from align.run.stage import Context, Outcome
from align.run.tracking import METRICS, flatten_figures
from align.settings.blocks import Fraction, ModelBlock, OptimizerBlock
from align.training.held_out import HELD_OUT, ScoredPair, held_out_figures, print_held_out
from align.training.stage import Epochs, MaxLength, PairMixBlock, PairStage, most_unusable, tell_rows

SCALE_PAIRS = 1000
"""The number of training pairs that give the scores' mean and spread if no pair is held out."""


class RewardBlock(PairMixBlock):
    """The reward model."""

    base: Literal["sft", "model"] = Field(
        "sft", description="start from the SFT policy, if the recipe has one, or from the recipe's model"
    )
    held_out: Annotated[Fraction, Field(lt=1)] = Field(
        0.1, description="share of the prompts whose pairs are held out to test the model"
    )
    optimizer: OptimizerBlock = Field(default_factory=OptimizerBlock)
    epochs: Epochs = 1.0
    max_length: MaxLength = 1024
    trl: dict[str, Any] = Field(default_factory=dict, description="further options of trl.RewardConfig")


class Reward(PairStage):
    name = "reward"
    help = "train a reward model on preference pairs"
    settings = RewardBlock
    outputs = ("model", "adapter", LEFT_OUT, METRICS, HELD_OUT)

    def inputs(self, settings: RewardBlock) -> tuple[str, ...]:
        return ("compare",) if settings.ai else ()

    def optional_inputs(self, settings: RewardBlock) -> tuple[str, ...]:
        return ("sft",) if settings.base == "sft" else ()

    def run(self, context: Context) -> Outcome:
        from align.models.loading import compute_dtype, load_tokenizer
        from align.run import processes
        from align.training.fit import fit
        from align.training.models import load_reward_model, score_pairs, set_separate_pad_token
        from align.training.trainers import SoftLabelRewardTrainer
        from align.training.trl_configs import RewardConfig, training_config

        settings: RewardBlock = context.settings
        block: ModelBlock = context.shared["model"]
        dtype = compute_dtype(block.precision)
        config = training_config(RewardConfig, context, dtype, max_length=None, disable_dropout=True)
        path, revision = context.policy
        tokenizer = load_tokenizer(path, revision=revision, trust_remote_code=block.trust_remote_code)
        set_separate_pad_token(tokenizer)
        counts: Counter[str] = Counter()
        with open_intake(context.output, counts) as intake:
            training, held_out = split_by_prompt(self.gather(context, intake), settings.held_out)
            columns = pair_columns(tokenizer, training, settings.max_length, block.system_prompt)
            tested = pair_columns(tokenizer, held_out, settings.max_length, block.system_prompt)
            for made, pairs in ((columns, training), (tested, held_out)):
                keep_left_out(made, pairs, intake, "pairs", most_unusable(settings.human))
        too_long = [*columns.too_long, *tested.too_long]
        counts.update(pairs=len(columns), pairs_held_out=len(tested), pairs_too_long=0)
        if not columns.rows:
            raise InputError(f"reward: no pair to train on; {dict(counts)}. Raise `max_length` or lower `held_out`")
        tell_rows(self.name, columns, intake, settings.max_length)

        model = load_reward_model(path, block, dtype, config.seed, revision)
        rows = whole_conversations(columns).rows
        trainer, result = fit(SoftLabelRewardTrainer, context, model, tokenizer, config, rows, dtype)
        scores = score_pairs(trainer, whole_conversations(tested).rows)
        scored = _scored([pair for pair in held_out if pair.id not in {*tested.too_long, *tested.refused}], scores)
        measured = held_out_figures(scored, derive_seed(context.seed, self.name, "bootstrap"))
        scale = scale_figures(scores or score_pairs(trainer, rows[:SCALE_PAIRS]))
        if processes.is_first():
            write_rows(context.output / HELD_OUT, scored)
            with context.tracker() as tracker:
                tracker.log(result.steps + 1, flatten_figures({"held_out": measured, **scale}))
            print_held_out(measured, context.run_name)
        sources = {"training": pairs_by_source(training), "held_out": pairs_by_source(held_out)}
        figures = {"base": settings.base, **scale, **measured, "pairs_too_long": too_long, "pairs_by_source": sources}
        return Outcome({**counts, "steps": result.steps}, {**figures, "last_step": dict(result.last_step)})


def prompt_id(prompt: Conversation) -> str:
    """The id of a prompt, which follows from its content."""
    return digest(as_dicts(prompt))


def split_by_prompt(
    pairs: Sequence[PreferencePair], held_out: float
) -> tuple[list[PreferencePair], list[PreferencePair]]:
    """(pairs to train on, pairs held out). A hash of the prompt decides, so no prompt is ever on both sides."""
    sides: tuple[list[PreferencePair], list[PreferencePair]] = ([], [])
    for pair in pairs:
        sides[is_held_out(pair.prompt, held_out)].append(pair)
    return sides


def is_held_out(prompt: Conversation, share: float) -> bool:
    """Whether a prompt is in the `share` of all prompts whose pairs are held out."""
    return int(digest(["held out", prompt_id(prompt)], 8), 16) / 16**8 < share


def scale_figures(scores: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Mean and standard deviation of the scores of chosen and rejected completions, by which PPO normalises rewards."""
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
