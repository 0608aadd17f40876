"""dpo: train the SFT policy directly on preference pairs and their soft labels (Rafailov et al. 2023)."""

from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from align.data.pair_mixing import pairs_by_source
from align.data.sources import LEFT_OUT, open_intake
from align.data.token_columns import keep_left_out, pair_columns
from align.errors import InputError
from align.records import PreferencePair
from align.run.stage import Context, Outcome
from align.settings.blocks import ModelBlock, Number, OptimizerBlock
from align.training.stage import Epochs, MaxLength, PairMixBlock, PairStage, most_unusable, tell_rows

LOSS_OPTIONS = (
    "loss_type loss_weights ld_alpha f_divergence_type f_alpha_divergence_coef label_smoothing use_weighting "
    "discopop_tau router_aux_loss_coef"
).split()
"""Options of TRL's own losses, none of which takes soft labels."""

IGNORED_SMOOTHING = "dpo.trl.label_smoothing: TRL ignores it with the loss `sigmoid`; use `loss_type: [robust]`"


class DpoBlock(PairMixBlock):
    """Direct preference optimization."""

    beta: Annotated[Number, Field(gt=0)] = Field(
        0.1, description="strength of the implicit KL constraint to the SFT policy"
    )
    optimizer: OptimizerBlock = Field(default_factory=lambda: OptimizerBlock(learning_rate=1e-5))
    epochs: Epochs = 1.0
    max_length: MaxLength = 1024
    trl: dict[str, Any] = Field(default_factory=dict, description="further options of trl.DPOConfig")


class Dpo(PairStage):
    name = "dpo"
    help = "train the SFT policy directly on preference pairs"
    settings = DpoBlock
    outputs = ("model", "adapter", LEFT_OUT, "metrics.jsonl")

    def inputs(self, settings: DpoBlock) -> tuple[str, ...]:
        return ("compare",) if settings.ai else ()

    def optional_inputs(self, settings: DpoBlock) -> tuple[str, ...]:
        return ("sft",)

    def check(self, settings: DpoBlock, shared: Mapping[str, Any]) -> list[str]:
        faults = super().check(settings, shared)
        return [*faults, IGNORED_SMOOTHING] if ignores_smoothing(settings) else faults

    def run(self, context: Context) -> Outcome:
        from align.models.loading import compute_dtype, load_tokenizer
        from align.training.fit import fit
        from align.training.models import load_policy
        from align.training.trainers import SoftLabelDPOTrainer
        from align.training.trl_configs import DPOConfig, training_config

        settings: DpoBlock = context.settings
        block: ModelBlock = context.shared["model"]
        dtype = compute_dtype(block.precision)
        config = training_config(DPOConfig, context, dtype, beta=settings.beta, max_length=None)
        counts: Counter[str] = Counter()
        policy, revision = context.policy
        with open_intake(context.output, counts) as intake:
            pairs = self.gather(context, intake)
            hard_loss = uses_trl_loss(settings, pairs)
            tokenizer = load_tokenizer(policy, revision=revision, trust_remote_code=block.trust_remote_code)
            columns = pair_columns(tokenizer, pairs, settings.max_length, block.system_prompt)
            keep_left_out(columns, pairs, intake, "pairs", most_unusable(settings.human))
        if not columns.rows:
            raise InputError(f"dpo.max_length: all pairs are longer than {settings.max_length} tokens; raise it")
        tell_rows(self.name, columns, intake, settings.max_length)

        model = load_policy(policy, block, dtype, config.seed, revision)
        reference = None
        if not block.lora:
            reference = load_policy(policy, block, dtype, config.seed, revision).requires_grad_(False)
        options = {"ref_model": reference, "hard_loss": hard_loss}
        _, result = fit(SoftLabelDPOTrainer, context, model, tokenizer, config, columns.rows, dtype, **options)
        counts.update(pairs=len(columns), pairs_too_long=0, steps=result.steps)
        figures = {"pairs_by_source": pairs_by_source(pairs), "pairs_too_long": list(columns.too_long)}
        return Outcome(counts, {**figures, "last_step": dict(result.last_step)})


def uses_trl_loss(settings: DpoBlock, pairs: list[PreferencePair]) -> bool:
    """Whether the recipe asks for one of TRL's own losses, which treat every label as certain.

    Raises:
        InputError: it does, and some pairs have soft labels; or it asks for label smoothing that the loss ignores.
    """
    asked = [name for name in LOSS_OPTIONS if name in settings.trl]
    soft = sum(pair.probability < 1 for pair in pairs)
    if asked and soft:
        raise InputError(
            f"dpo.trl.{asked[0]}: TRL's losses treat labels as certain, and {soft} of {len(pairs)} pairs have "
            f"soft labels; leave out {', '.join(asked)}, or train on human pairs alone"
        )
    if ignores_smoothing(settings):
        raise InputError(IGNORED_SMOOTHING)
    return bool(asked)


def ignores_smoothing(settings: DpoBlock) -> bool:
    """Whether the recipe asks for label smoothing with a loss of TRL's that does not read it."""
    return bool(settings.trl.get("label_smoothing")) and settings.trl.get("loss_type", ["sigmoid"]) == ["sigmoid"]


STAGE = Dpo()
