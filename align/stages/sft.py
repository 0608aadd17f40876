"""sft: fine-tune the base model on accepted revisions and helpful demonstrations (Bai et al. 2022, section 3).

The result is the policy that all later training starts from, and the reference of its KL penalty.
"""

import random
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from align.data.demonstrations import read_demonstrations
from align.data.sources import LEFT_OUT, Intake, open_intake
from align.data.token_columns import demonstration_columns, keep_left_out
from align.engines.provenance import PROVENANCE, write_provenance
from align.errors import InputError
from align.feedback.gates import TextFaultShares, TextGatesBlock, check_gates, gate_figures
from align.feedback.records import Revision
from align.records import Demonstration, Prompt, Sample, Split, read_rows, write_rows
from align.run import processes
from align.run.reproducibility import derive_seed
from align.run.stage import Context, Outcome, Stage
from align.settings.blocks import Block, Fraction, ModelBlock, OptimizerBlock
from align.settings.data import PairSource
from align.training.stage import Epochs, MaxLength, local_paths, most_unusable, tell_rows

SPLIT: Split = "sft"


class HelpfulBlock(Block):
    """Demonstrations that keep the model helpful while revisions teach it the constitution."""

    own_samples: bool = Field(
        True, description="use the base model's complete answers to harmless prompts that have no accepted revision"
    )
    harmless: tuple[str, ...] = Field(
        (), description="the only prompt files or categories from which own samples are taken"
    )
    sources: tuple[PairSource, ...] = Field((), description="demonstrations, or preference pairs (the chosen side)")
    share: Annotated[Fraction, Field(lt=1)] = Field(
        0.25, description="of all demonstrations; less if there are too few"
    )


class SftBlock(Block):
    """Supervised fine-tuning."""

    revisions: bool = Field(True, description="false trains on all of `helpful.sources`, and on nothing else")
    helpful: HelpfulBlock = Field(default_factory=HelpfulBlock)
    optimizer: OptimizerBlock = Field(default_factory=OptimizerBlock)
    epochs: Epochs = 1.0
    max_length: MaxLength = 1024
    gates: TextGatesBlock = Field(default_factory=TextGatesBlock)
    trl: dict[str, Any] = Field(default_factory=dict, description="further options of trl.SFTConfig")


class Sft(Stage):
    name = "sft"
    help = "fine-tune the base model on accepted revisions and helpful demonstrations"
    settings = SftBlock
    shares = ("model",)
    trains = True
    outputs = ("model", "adapter", "demonstrations.jsonl", LEFT_OUT, PROVENANCE, "metrics.jsonl")

    def inputs(self, settings: SftBlock) -> tuple[str, ...]:
        if not settings.revisions:
            return ()
        return ("sample", "revise") if settings.helpful.own_samples else ("revise",)

    def files(self, settings: SftBlock) -> tuple[str, ...]:
        return local_paths(settings.helpful.sources)

    def splits(self, settings: SftBlock) -> tuple[Split, ...]:
        return (SPLIT,) if settings.revisions else ()

    def check_upstream(self, settings: SftBlock, upstream: Mapping[str, Any]) -> list[str]:
        if not settings.revisions or "revise" not in upstream or SPLIT in upstream["revise"].splits:
            return []
        return [f"sft.revisions: no sample of the split '{SPLIT}' is revised; add it to `revise.splits`"]

    def check(self, settings: SftBlock, shared: Mapping[str, Any]) -> list[str]:
        helpful = settings.helpful
        faults = [
            f"sft.helpful.sources[{number}].{name}: makes pairs, and sft reads demonstrations; leave it out"
            for number, source in enumerate(helpful.sources)
            for name in ("margin_scale", "ranked_pairs")
            if name in source.model_fields_set
        ]
        if settings.revisions:
            return faults + _mix_problems(helpful)
        faults += [
            f"sft.helpful.{name}: has no effect with `revisions: false`; leave it out"
            for name in ("own_samples", "harmless", "share")
            if name in helpful.model_fields_set
        ]
        if not helpful.sources:
            faults.append("sft.helpful.sources: with `revisions: false` at least one source is needed; add one")
        return faults

    def run(self, context: Context) -> Outcome:
        from align.models.loading import compute_dtype, load_tokenizer
        from align.training.fit import fit
        from align.training.models import load_policy
        from align.training.trainers import DemonstrationTrainer
        from align.training.trl_configs import SFTConfig, training_config

        settings: SftBlock = context.settings
        block: ModelBlock = context.shared["model"]
        dtype = compute_dtype(block.precision)
        config = training_config(
            SFTConfig,
            context,
            dtype,
            max_length=settings.max_length,
            dataset_kwargs={"skip_prepare_dataset": not settings.trl.get("packing", False)},
        )
        counts: Counter[str] = Counter()
        with open_intake(context.output, counts) as intake:
            demonstrations = gather(context, intake)
            texts = TextFaultShares()
            for demonstration in demonstrations:
                texts.add(demonstration.completion)
            shares = texts.shares()
            check_gates(self.name, settings.gates, shares, _sources(context))
            tokenizer = load_tokenizer(block.path, revision=block.revision, trust_remote_code=block.trust_remote_code)
            columns = demonstration_columns(tokenizer, demonstrations, settings.max_length, block.system_prompt)
            allowed = most_unusable(settings.helpful.sources)
            keep_left_out(columns, demonstrations, intake, "demonstrations", allowed)
        if not columns.rows:
            raise InputError(f"sft.max_length: all rows are longer than {settings.max_length} tokens; raise it")
        tell_rows(self.name, columns, intake, settings.max_length)

        model = load_policy(block.path, block, dtype, config.seed, block.revision)
        _, result = fit(DemonstrationTrainer, context, model, tokenizer, config, columns.rows, dtype)
        if processes.is_first():
            left_out = {*columns.too_long, *columns.refused}
            kept = (demonstration for demonstration in demonstrations if demonstration.id not in left_out)
            write_rows(context.output / "demonstrations.jsonl", kept)
        write_provenance(context.output, (), context.inputs.values())
        counts.update(demonstrations=len(columns), demonstrations_too_long=0, steps=result.steps)
        return Outcome(
            counts,
            {"too_long": list(columns.too_long), "last_step": dict(result.last_step), "gates": gate_figures(shares)},
        )


def _sources(context: Context) -> str:
    """The files and folders that the demonstrations come from, for a message."""
    files = [source.title for source in context.settings.helpful.sources]
    return ", ".join(map(str, [*context.inputs.values(), *files]))


def _mix_problems(helpful: HelpfulBlock) -> list[str]:
    """What is wrong with the settings of the demonstrations that are mixed with revisions."""
    if not helpful.share:
        return []
    if helpful.own_samples and not helpful.harmless:
        return [
            "sft.helpful.harmless: names no prompts, and the base model must not be trained on its own answers to "
            "harmful ones; name prompt files or categories, or set `own_samples: false`"
        ]
    if "share" in helpful.model_fields_set and not (helpful.own_samples or helpful.sources):
        return ["sft.helpful.share: there are no helpful demonstrations; set `own_samples: true` or give `sources`"]
    return []


def gather(context: Context, intake: Intake) -> list[Demonstration]:
    """The demonstrations to train on, counted by kind: revisions first, then helpful ones drawn with the seed.

    Raises:
        InputError: there are none.
    """
    settings: SftBlock = context.settings
    sources = [each for source in settings.helpful.sources for each in read_demonstrations(source, intake)]
    counts = intake.counts
    if not settings.revisions:
        counts["helpful"] = len(sources)
        return sources

    revisions = _accepted(context.inputs["revise"])
    own = _own_samples(context.inputs["sample"], settings.helpful, revisions) if settings.helpful.own_samples else []
    share = settings.helpful.share
    wanted = round(len(revisions) * share / (1 - share))
    pool = own + sources
    helpful = random.Random(derive_seed(context.seed, "sft", "helpful")).sample(pool, min(wanted, len(pool)))
    counts.update(revisions=len(revisions), helpful=len(helpful), helpful_wanted=wanted, helpful_available=len(pool))
    if not revisions:
        raise InputError(
            f"{context.inputs['revise']}/revisions.jsonl: no accepted revision to train on; rejected.jsonl beside it "
            "says why each was rejected"
        )
    return list(revisions.values()) + helpful


def _accepted(revise: Path) -> dict[str, Demonstration]:
    """Accepted revisions of the sft split, by prompt id."""
    rows = read_rows(revise / "revisions.jsonl", Revision)
    return {
        row.prompt_id: Demonstration(
            row.id,
            row.prompt,
            row.completion,
            "revision",
            seed=row.seed,
            provenance=row.provenance,
            judge_provenance=row.judge_provenance,
            revised_by=row.revised_by,
            judged_by=row.judged_by,
            p_better=row.p_better,
        )
        for row in rows
        if row.accepted and row.split == SPLIT
    }


def _own_samples(sample: Path, block: HelpfulBlock, revisions: Mapping[str, Demonstration]) -> list[Demonstration]:
    """The base model's complete answers to harmless prompts that have no accepted revision.

    The answer to a harmful prompt is what its revision was meant to replace, so it must not come back when the revision
    is rejected.
    """
    harmless = _harmless_prompts(sample / "prompts.jsonl", block.harmless) if block.harmless else set()
    return [
        Demonstration(row.id, row.prompt, row.completion, "own", seed=row.seed, provenance=row.provenance)
        for row in read_rows(sample / "samples.jsonl", Sample)
        if row.split == SPLIT
        and row.finish_reason == "stop"
        and row.completion.strip()
        and row.prompt_id not in revisions
        and row.prompt_id in harmless
    ]


def _harmless_prompts(prompts: Path, names: tuple[str, ...]) -> set[str]:
    """The ids of the prompts whose category or file is among the names.

    Raises:
        InputError: no prompt has a category or file of one of the names.
    """
    rows = list(read_rows(prompts, Prompt))
    known = {name for row in rows for name in (row.category, row.source) if name}
    if unknown := [name for name in names if name not in known]:
        raise InputError(
            f"sft.helpful.harmless: no prompt of category or file {unknown[0]!r} in {prompts}; "
            f"choose from {', '.join(sorted(known)) or 'none: no prompt has either'}"
        )
    return {row.id for row in rows if row.category in names or row.source in names}


STAGE = Sft()
