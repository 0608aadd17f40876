"""dpo: train the SFT policy on preference pairs directly (Rafailov et al. 2023), against their soft labels."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from align.data.pairs import gather_pairs, mix_faults, pairs_by_source
from align.data.token_columns import pair_columns
from align.errors import InputError
from align.records import PreferencePair
from align.run.stage import Context, Outcome, Stage
from align.settings.blocks import HUMAN_SHARE, Block, Fraction, ModelBlock, Number, OptimizerBlock, PairSource, Positive

LOSS_OPTIONS = (
    "loss_type",
    "loss_weights",
    "ld_alpha",
    "f_divergence_type",
    "f_alpha_divergence_coef",
    "label_smoothing",
    "use_weighting",
    "discopop_tau",
    "router_aux_loss_coef",
)
"""Options of TRL's own losses, which know no soft labels."""

IGNORED_SMOOTHING = "dpo.trl.label_smoothing: TRL ignores it with the loss `sigmoid`; use `loss_type: [robust]`"


class DpoBlock(Block):
    """Direct preference optimization."""

    ai: bool = Field(True, description="train on the pairs that the judge labelled")
    human: tuple[PairSource, ...] = Field((), description="preference pairs that people labelled")
    human_share: Annotated[Fraction, Field(gt=0, lt=1)] | None = Field(None, description=HUMAN_SHARE)
    beta: Annotated[Number, Field(gt=0)] = Field(0.1, description="how strongly the policy is held to the SFT policy")
    optimizer: OptimizerBlock = Field(default_factory=lambda: OptimizerBlock(learning_rate=1e-5))
    epochs: Annotated[Number, Field(gt=0)] = Field(1.0, description="passes over the pairs")
    max_length: Positive = Field(1024, description="tokens; longer pairs are left out and counted")
    trl: dict[str, Any] = Field(default_factory=dict, description="further options of trl.DPOConfig")


class Dpo(Stage):
    """Trains the SFT policy on preference pairs, with the SFT policy as its reference."""

    name = "dpo"
    help = "train the SFT policy on preference pairs directly"
    settings = DpoBlock
    shares = ("model",)
    outputs = ("model", "adapter", "metrics.jsonl")

    def inputs(self, settings: DpoBlock) -> tuple[str, ...]:
        return ("sft", "compare") if settings.ai else ("sft",)

    def files(self, settings: DpoBlock) -> tuple[str, ...]:
        return tuple(source.path for source in settings.human if Path(source.path).expanduser().exists())

    def check(self, settings: DpoBlock, shared: Mapping[str, Any]) -> list[str]:
        faults = mix_faults(self.name, settings.ai, settings.human, settings.human_share)
        return [*faults, IGNORED_SMOOTHING] if ignores_smoothing(settings) else faults

    def run(self, context: Context) -> Outcome:
        from align.models.loading import compute_dtype, load_tokenizer
        from align.training.trainers import SoftLabelDPOTrainer, fit, load_trainable
        from align.training.trl_configs import DPOConfig, training_config

        settings: DpoBlock = context.settings
        block: ModelBlock = context.shared["model"]
        dtype = compute_dtype(block.precision)
        config = training_config(DPOConfig, context, dtype, beta=settings.beta, max_length=None)
        counts: Counter[str] = Counter()
        ai = context.inputs["compare"] / "pairs.jsonl" if settings.ai else None
        pairs = gather_pairs(ai, settings.human, counts, settings.human_share)
        hard_loss = check_loss(settings, pairs)
        sft = str(context.inputs["sft"] / "model")
        tokenizer = load_tokenizer(sft, trust_remote_code=block.trust_remote_code)
        columns = pair_columns(tokenizer, pairs, settings.max_length, block.system_prompt)
        if not columns.rows:
            raise InputError(f"dpo.max_length: all pairs are longer than {settings.max_length} tokens; raise it")

        model = load_trainable(sft, block, dtype, config.seed)
        reference = None if block.lora else load_trainable(sft, block, dtype, config.seed).requires_grad_(False)
        options = {"ref_model": reference, "hard_loss": hard_loss}
        _, trained = fit(SoftLabelDPOTrainer, context, model, tokenizer, config, columns.rows, dtype, **options)
        counts.update(pairs=len(columns), pairs_too_long=len(columns.too_long), steps=trained.steps)
        figures = {"pairs_by_source": pairs_by_source(pairs), "pairs_too_long": list(columns.too_long)}
        return Outcome(counts, {**figures, "last_step": dict(trained.figures)})


def check_loss(settings: DpoBlock, pairs: list[PreferencePair]) -> bool:
    """Whether the recipe asks for one of TRL's own losses, which take every label for certain.

    Raises:
        InputError: it does, and there are soft labels among the pairs; or a label smoothing that the loss ignores.
    """
    asked = [name for name in LOSS_OPTIONS if name in settings.trl]
    soft = sum(pair.probability < 1 for pair in pairs)
    if asked and soft:
        raise InputError(
            f"dpo.trl.{asked[0]}: TRL's losses take labels for certain, and {soft} of {len(pairs)} pairs have soft "
            f"ones; leave out {', '.join(asked)}, or train on human pairs alone"
        )
    if ignores_smoothing(settings):
        raise InputError(IGNORED_SMOOTHING)
    return bool(asked)


def ignores_smoothing(settings: DpoBlock) -> bool:
    """Whether a label smoothing is asked for that TRL's loss does not read."""
    return bool(settings.trl.get("label_smoothing")) and settings.trl.get("loss_type", ["sigmoid"]) == ["sigmoid"]


STAGE = Dpo()
