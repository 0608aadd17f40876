"""sft: fine-tune the base model on accepted revisions and helpful demonstrations (Bai et al. 2022, section 3).

The result is the policy that everything after starts from, and the reference that it is held to.
"""

import random
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from align.data.pairs import read_demonstrations
from align.data.token_columns import demonstration_columns
from align.engines.provenance import PROVENANCE, write_provenance
from align.errors import InputError
from align.feedback.gates import TextFaultShares, TextGatesBlock, check_gates, gate_figures
from align.feedback.records import Revision
from align.records import Demonstration, Prompt, Sample, Split, read_rows, write_rows
from align.run import processes
from align.run.reproducibility import derive_seed
from align.run.stage import Context, Outcome, Stage
from align.settings.blocks import Block, Fraction, ModelBlock, Number, OptimizerBlock, PairSource, Positive

SPLIT: Split = "sft"


class HelpfulBlock(Block):
    """Demonstrations that keep the model helpful while the revisions teach it the constitution."""

    own_samples: bool = Field(
        True, description="the base model's own finished completions of harmless prompts without an accepted revision"
    )
    harmless: tuple[str, ...] = Field(
        (), description="the prompt files or categories that own samples are taken from; no others ever are"
    )
    sources: tuple[PairSource, ...] = Field((), description="demonstrations, or preference pairs (the chosen side)")
    share: Annotated[Fraction, Field(lt=1)] = Field(0.25, description="of the mix; less where there are too few")


class SftBlock(Block):
    """Supervised fine-tuning."""

    revisions: bool = Field(True, description="false trains on `helpful.sources` alone, all of it")
    helpful: HelpfulBlock = Field(default_factory=HelpfulBlock)
    optimizer: OptimizerBlock = Field(default_factory=OptimizerBlock)
    epochs: Annotated[Number, Field(gt=0)] = Field(1.0, description="passes over the demonstrations")
    max_length: Positive = Field(1024, description="tokens; longer rows are left out and counted")
    gates: TextGatesBlock = Field(default_factory=TextGatesBlock)
    trl: dict[str, Any] = Field(default_factory=dict, description="further options of trl.SFTConfig")


class Sft(Stage):
    """Fine-tunes the base model on revisions and helpful demonstrations."""

    name = "sft"
    help = "fine-tune the base model on accepted revisions and helpful demonstrations"
    settings = SftBlock
    shares = ("model",)
    outputs = ("model", "adapter", "demonstrations.jsonl", PROVENANCE, "metrics.jsonl")

    def inputs(self, settings: SftBlock) -> tuple[str, ...]:
        if not settings.revisions:
            return ()
        return ("sample", "revise") if settings.helpful.own_samples else ("revise",)

    def files(self, settings: SftBlock) -> tuple[str, ...]:
        return tuple(source.path for source in settings.helpful.sources if Path(source.path).expanduser().exists())

    def splits(self, settings: SftBlock) -> tuple[Split, ...]:
        return (SPLIT,) if settings.revisions else ()

    def check_upstream(self, settings: SftBlock, upstream: Mapping[str, Any]) -> list[str]:
        if not settings.revisions or "revise" not in upstream or SPLIT in upstream["revise"].splits:
            return []
        return [f"sft.revisions: no sample of the split '{SPLIT}' is revised; name it in `revise.splits`"]

    def check(self, settings: SftBlock, shared: Mapping[str, Any]) -> list[str]:
        helpful = settings.helpful
        if settings.revisions:
            return _mix_problems(helpful)
        faults = [
            f"sft.helpful.{name}: has no effect with `revisions: false`; leave it out"
            for name in ("own_samples", "harmless", "share")
            if name in helpful.model_fields_set
        ]
        if not helpful.sources:
            faults.append("sft.helpful.sources: with `revisions: false` there must be at least one")
        return faults

    def run(self, context: Context) -> Outcome:
        from align.models.loading import compute_dtype, load_tokenizer
        from align.training.trainers import DemonstrationTrainer, fit, load_trainable
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
        demonstrations = gather(context, counts)
        texts = TextFaultShares()
        for demonstration in demonstrations:
            texts.add(demonstration.completion)
        shares = texts.shares()
        check_gates(self.name, settings.gates, shares, _sources(context))
        tokenizer = load_tokenizer(block.path, revision=block.revision, trust_remote_code=block.trust_remote_code)
        columns = demonstration_columns(tokenizer, demonstrations, settings.max_length, block.system_prompt)
        if not columns.rows:
            raise InputError(f"sft.max_length: all rows are longer than {settings.max_length} tokens; raise it")

        model = load_trainable(block.path, block, dtype, config.seed, block.revision)
        _, trained = fit(DemonstrationTrainer, context, model, tokenizer, config, columns.rows, dtype)
        if processes.is_first():
            too_long = set(columns.too_long)
            kept = (demonstration for demonstration in demonstrations if demonstration.id not in too_long)
            write_rows(context.output / "demonstrations.jsonl", kept)
        write_provenance(context.output, (), context.inputs.values())
        counts.update(demonstrations=len(columns), too_long=len(columns.too_long), steps=trained.steps)
        return Outcome(
            counts,
            {"too_long": list(columns.too_long), "last_step": dict(trained.figures), "gates": gate_figures(shares)},
        )


def _sources(context: Context) -> str:
    """Where the demonstrations come from."""
    files = [source.path for source in context.settings.helpful.sources]
    return ", ".join(map(str, [*context.inputs.values(), *files]))


def _mix_problems(helpful: HelpfulBlock) -> list[str]:
    """What is wrong with the helpful mix beside revisions."""
    if not helpful.share:
        return []
    if helpful.own_samples and not helpful.harmless:
        return [
            "sft.helpful.harmless: nothing says which prompts are harmless, and the base model's own answers to the "
            "others must not be taught; name prompt files or categories, or set `own_samples: false`"
        ]
    if "share" in helpful.model_fields_set and not (helpful.own_samples or helpful.sources):
        return ["sft.helpful.share: nothing to take it from; set `own_samples: true` or give `sources`"]
    return []


def gather(context: Context, counts: Counter[str]) -> list[Demonstration]:
    """The demonstrations to train on, counted by kind: revisions first, then the helpful ones drawn by the seed.

    Raises:
        InputError: there are none.
    """
    settings: SftBlock = context.settings
    sources = [each for source in settings.helpful.sources for each in read_demonstrations(source, counts)]
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
    """The base model's completions that ended by themselves, of harmless prompts without an accepted revision.

    Of a harmful prompt they are what its revision was to replace, so a rejected revision must not bring them back.
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
    """Ids of the prompts whose category or file is named.

    Raises:
        InputError: a name that no prompt goes by.
    """
    rows = list(read_rows(prompts, Prompt))
    known = {name for row in rows for name in (row.category, row.source) if name}
    if unknown := [name for name in names if name not in known]:
        raise InputError(
            f"sft.helpful.harmless: no prompt of category or file {unknown[0]!r} in {prompts}; "
            f"there are {', '.join(sorted(known)) or 'none that have one'}"
        )
    return {row.id for row in rows if row.category in names or row.source in names}


STAGE = Sft()
