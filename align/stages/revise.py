"""revise: the model criticises and rewrites its own completions by the constitution; the judge accepts or rejects.

Unlike in Bai et al. 2022, a revision is not assumed to be better: it has to pass filters and hard rules, and the judge
must prefer it to the original. Rejected revisions are written to rejected.jsonl with the reason. The raw scores of the
judge's engine are kept in opinions.jsonl, as in compare. Rows are streamed, a window at a time.
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from align.constitution.loading import load_constitution, try_load_constitution
from align.data.prompts import with_split
from align.engines.provenance import CONSTITUTION, PROVENANCE, text_provenance, write_constitution, write_provenance
from align.errors import InputError
from align.feedback.filters import OPTIONAL, FilterName, only_refuses, refuses
from align.feedback.gates import FaultShare, ReviseGatesBlock, TextFaultShares, check_gates, gate_figures
from align.feedback.judged_revisions import REVISE_OPINIONS, reject_near_duplicate
from align.feedback.near_duplicates import NearDuplicateIndex
from align.records import Prompt, Sample, Split, read_rows
from align.run.reproducibility import derive_seed
from align.run.stage import Context, Outcome, Stage
from align.run.streaming import DEFAULT_WINDOW, WINDOW_HELP, RowFile, SeenOnDisk, windows
from align.run.tracking import METRICS
from align.settings.blocks import Block, EngineBlock, Fraction, Integer, ModelBlock, Positive, SamplingBlock

if TYPE_CHECKING:
    from align.feedback.critique import CritiqueLoop
    from align.feedback.judge import Judge
    from align.feedback.tallies import RevisionTally


class ReviseBlock(Block):
    """Critique and revision."""

    rounds: Positive = Field(1, description="each round draws one principle; the paper runs 4")
    critique: bool = Field(True, description="false asks for the revision without a critique before it")
    splits: tuple[Split, ...] = Field(("sft",), description="the splits whose samples are revised")
    sampling: SamplingBlock = Field(default_factory=SamplingBlock)
    engine: EngineBlock = Field(default_factory=EngineBlock)
    critic: EngineBlock | None = Field(None, description="writes the critiques; null leaves them to `engine`")
    examples: Annotated[Integer, Field(ge=0)] = Field(2, description="worked examples shown before each request")
    filters: tuple[FilterName, ...] = Field(
        OPTIONAL, description="filters that apply besides 'cut' and 'empty', which always do"
    )
    principle: Literal["all", "draw"] = Field(
        "all", description="the judge averages over all principles that apply, or draws one for each revision"
    )
    near_duplicates: Fraction | None = Field(
        0.8, description="similarity at which a revision is rejected as repeating an earlier accepted one; null: never"
    )
    gates: ReviseGatesBlock = Field(default_factory=ReviseGatesBlock)
    window: Positive = Field(DEFAULT_WINDOW, description=WINDOW_HELP)


class ReviseStage(Stage):
    name = "revise"
    help = "criticise and revise the samples by the constitution"
    settings = ReviseBlock
    shares = ("model", "constitution", "judge")
    gate_settings = ("gates",)
    outputs = (
        "critiques.jsonl",
        "revisions.jsonl",
        "rejected.jsonl",
        REVISE_OPINIONS,
        CONSTITUTION,
        PROVENANCE,
        METRICS,
    )

    def inputs(self, settings: ReviseBlock) -> tuple[str, ...]:
        return ("sample",)

    def splits(self, settings: ReviseBlock) -> tuple[Split, ...]:
        return settings.splits

    def check_upstream(self, settings: ReviseBlock, upstream: Mapping[str, Any]) -> list[str]:
        sampled = upstream["sample"].splits if "sample" in upstream else settings.splits
        return [
            f"revise.splits: no prompt of the split '{split}' is completed; add it to `sample.splits`"
            for split in settings.splits
            if split not in sampled
        ]

    def check(self, settings: ReviseBlock, shared: Mapping[str, Any]) -> list[str]:
        from align.feedback.critique import revising_principles
        from align.feedback.probes import labelling_problems

        constitution = try_load_constitution(shared["constitution"])
        if constitution is None:
            return _unused_keys(settings)
        problems = [*_unused_keys(settings), *labelling_problems(constitution, shared["judge"])]
        if not revising_principles(constitution):
            problems.append("constitution: no principle to revise by; give one a `text`, or `critique` and `revision`")
        return problems

    def run(self, context: Context) -> Outcome:
        from align.engines.open import open_engine
        from align.feedback.critique import CritiqueLoop
        from align.feedback.labelling_judge import labels_of, open_labelling_judge
        from align.feedback.tallies import RevisionTally

        settings: ReviseBlock = context.settings
        model: ModelBlock = context.shared["model"]
        constitution = load_constitution(context.shared["constitution"])
        total = count_samples(context)
        engine = open_engine(settings.engine, model)
        judge_shares_engine = context.shared["judge"].engine == settings.engine
        judge, report = open_labelling_judge(context, constitution, engine if judge_shares_engine else None)
        critic = open_engine(settings.critic, model) if settings.critic and settings.critique else None

        how: dict[str, Any] = {"critique": settings.critique, "examples": settings.examples}
        critique = None
        if settings.critique:
            block = settings.critic or settings.engine
            critique = text_provenance(context, "critique", critic or engine, block, constitution, **how)
        revision = text_provenance(context, "revision", engine, settings.engine, constitution, **how)
        labels = labels_of(context, judge, report)
        write_provenance(context.output, filter(None, (critique, revision, labels)), [context.inputs["sample"]])
        write_constitution(context.output, constitution)

        loop = CritiqueLoop(
            constitution=constitution,
            engine=engine,
            sampling=settings.sampling,
            seed=derive_seed(context.seed, self.name),
            critique=settings.critique,
            examples=settings.examples,
            filters=settings.filters,
            critic=critic,
            provenance=revision.id,
            critique_provenance=critique.id if critique else "",
        )
        tally = RevisionTally(settings.rounds)
        shares = revise_all(context, loop, judge, total, tally, labels.id)
        figures = {"judge": report.as_figures(), **tally.figures(), "gates": gate_figures(shares | _ungated(tally))}
        counts = tally.counts()
        context.log_rows(_logged(counts, figures))
        check_gates(self.name, settings.gates, shares, context.output / "revisions.jsonl")
        return Outcome(counts, figures)


def _unused_keys(settings: ReviseBlock) -> list[str]:
    """Settings that have no effect, as faults."""
    if settings.critic is None or settings.critique:
        return []
    return ["revise.critic: has no effect with `critique: false`; remove one of the two"]


def chosen_samples(context: Context) -> Iterator[Sample]:
    """The samples of the splits that are revised, in the order of sample's file."""
    samples = read_rows(context.inputs["sample"] / "samples.jsonl", Sample)
    return (sample for sample in samples if sample.split in context.settings.splits)


def count_samples(context: Context) -> int:
    """The number of samples that are revised.

    Raises:
        InputError: there are none.
    """
    total = sum(1 for _ in chosen_samples(context))
    if not total:
        raise InputError(
            f"{context.inputs['sample'] / 'samples.jsonl'}: no sample of the splits "
            f"{', '.join(context.settings.splits)}; add them to `sample.splits`, or add prompts"
        )
    return total


def benign_prompts(context: Context) -> SeenOnDisk:
    """The ids of the prompts whose category or file is listed in `gates.benign`.

    Raises:
        InputError: a name on the list matches no prompt that is revised, so that its gate would have nothing to count.
    """
    names = set(context.settings.gates.benign)
    unknown, benign = set(names), SeenOnDisk()
    path = context.inputs["sample"] / "prompts.jsonl"
    for prompt in with_split(read_rows(path, Prompt), context.settings.splits) if names else ():
        if found := names & {prompt.category, prompt.source}:
            unknown -= found
            benign.is_new(prompt.id)
    if unknown:
        raise InputError(
            f"revise.gates.benign: no prompt of category or file {min(unknown)!r} of the splits "
            f"{', '.join(context.settings.splits)} in {path}; remove it, or add prompts"
        )
    return benign


def _gated(tally: "RevisionTally") -> dict[str, FaultShare]:
    """The shares of all samples that gates limit."""
    return {
        "cut": FaultShare(tally.reasons["cut"], tally.samples),
        "not_accepted": FaultShare(tally.samples - tally.accepted, tally.samples),
    }


def _ungated(tally: "RevisionTally") -> dict[str, FaultShare]:
    """A share that no gate limits, because a cut critique may still lead to a good revision."""
    return {"critiques_cut": FaultShare(tally.critiques_cut, tally.critiques)} if tally.critiques else {}


def revise_all(
    context: Context, loop: "CritiqueLoop", judge: "Judge", total: int, tally: "RevisionTally", judge_provenance: str
) -> dict[str, FaultShare]:
    """Revise and judge every sample, window by window, and write the rows; returns the shares for the gates.

    Args:
        total: the number of samples.
        judge_provenance: the id of the labels' provenance, for the rows.
    """
    from align.feedback.revision_rows import revise_window

    settings: ReviseBlock = context.settings
    benign, benign_refused, refusal_only, texts = benign_prompts(context), FaultShare(), FaultShare(), TextFaultShares()
    earlier = NearDuplicateIndex(settings.near_duplicates)
    critiques, revisions, rejected, opinions = (
        RowFile(context.output / name)
        for name in ("critiques.jsonl", "revisions.jsonl", "rejected.jsonl", REVISE_OPINIONS)
    )
    with critiques, revisions, rejected, opinions:
        for window in windows(chosen_samples(context), total, settings.window, context.output):
            for chain, judged, scores in revise_window(window, loop, judge, settings.rounds, judge_provenance):
                row = reject_near_duplicate(judged, earlier)
                if row.accepted:
                    texts.add(row.completion)
                if chain.rounds:
                    # Counted under any `filters`: leaving out 'refusal' is no request for evasive revisions.
                    refusal_only.add(row.completion, only_refuses(row.completion))
                if row.prompt_id in benign:
                    benign_refused.add(row.completion, refuses(row.completion))
                for made in chain.rounds:
                    critiques.add(made)
                for each in scores:
                    opinions.add(each)
                (revisions if row.accepted else rejected).add(row)
                tally.add(chain, row)
    return {**texts.shares(), **_gated(tally), "benign_refused": benign_refused, "refusal_only": refusal_only}


def _logged(counts: Mapping[str, int], figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each round. The last also has the stage's other figures, and its counts as shares of the samples."""
    *rows, last = ({"round": each} for each in figures["by_round"])
    shares = {name: count / counts["samples"] for name, count in counts.items() if name != "samples"}
    others = {name: value for name, value in figures.items() if name != "by_round"}
    return [*rows, {**last, "samples": counts["samples"], **shares, **others}]


STAGE = ReviseStage()
