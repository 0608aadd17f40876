"""compare: the SFT policy answers each prompt twice, and the judge says which answer follows the constitution better.

The labels are soft: the reward model and DPO are trained on probabilities (Bai et al. 2022, section 4.1). Ties, and
completions that are cut, empty or identical, stay in comparisons.jsonl with the reason but make no pair. The
engine's raw scores are kept in opinions.jsonl and the principles in constitution.json, so that `align relabel` can
recompute the labels. Revise's scores are kept too, for the revisions that may become pairs. Rows are streamed, a window
at a time.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from align.constitution.loading import load_constitution, try_load_constitution
from align.data.pair_mixing import gather_pairs
from align.data.prompts import stream_drawn_prompts
from align.data.sources import LEFT_OUT, Intake, open_intake
from align.engines.provenance import CONSTITUTION, PROVENANCE, text_provenance, write_constitution, write_provenance
from align.errors import InputError
from align.feedback.calibration import JudgedPair, calibration_figures, print_calibration
from align.feedback.gates import CompareGatesBlock, FaultShare, check_gates, gate_figures
from align.feedback.judged_revisions import REVISION_FILES, JudgedRevisionFiles, judged_by_stage, stage_settings
from align.feedback.label_files import LabelFiles
from align.feedback.preference_pairs import comparison_pair, revision_pairs, with_provenance
from align.feedback.records import Revision
from align.records import Prompt, Split, read_rows, write_rows
from align.run import processes
from align.run.artefacts import write_json
from align.run.reproducibility import derive_seed
from align.run.stage import Context, Outcome, Stage
from align.run.streaming import DEFAULT_WINDOW, WINDOW_HELP, windows
from align.run.tracking import METRICS
from align.settings.blocks import Block, EngineBlock, Fraction, Integer, Positive, SamplingBlock
from align.settings.data import PairSource

if TYPE_CHECKING:
    from align.engines.engine import Engine
    from align.feedback.judge import Judge
    from align.feedback.tallies import ComparisonTally

SPLIT: Split = "preference"
CALIBRATION = "calibration.jsonl"


class CalibrationBlock(Block):
    """Pairs that people labelled, on which the judge is tested before it labels."""

    human: Annotated[tuple[PairSource, ...], Field(min_length=1)] = Field(
        description="preference pairs that people labelled"
    )
    min_accuracy: Annotated[Fraction, Field(ge=0.5, lt=1)] = Field(
        0.5, description="the 95% interval of the judge's accuracy on these pairs must lie above this"
    )


class CompareBlock(Block):
    """Preference labels by the judge."""

    sampling: SamplingBlock = Field(default_factory=SamplingBlock)
    completions: Annotated[Integer, Field(ge=2)] = Field(2, description="per prompt; every two of them are compared")
    revision_pairs: bool = Field(False, description="add pairs of accepted revisions over originals that were not cut")
    limit: Positive | None = Field(None, description="at most this many prompts, chosen by a hash of their content")
    principle: Literal["all", "draw"] = Field(
        "all", description="the judge averages over all principles that apply, or draws one for each comparison"
    )
    calibration: CalibrationBlock | None = Field(
        None, description="test the judge on human pairs first; `judge.allow_chance` continues even if it fails"
    )
    gates: CompareGatesBlock = Field(default_factory=CompareGatesBlock)
    window: Positive = Field(DEFAULT_WINDOW, description=WINDOW_HELP)


class CompareStage(Stage):
    name = "compare"
    help = "label pairs of the SFT policy's completions by the constitution"
    settings = CompareBlock
    shares = ("model", "constitution", "judge")
    gate_settings = ("gates",)
    outputs = (
        "comparisons.jsonl",
        "pairs.jsonl",
        "opinions.jsonl",
        *REVISION_FILES,
        CONSTITUTION,
        "agreement.json",
        CALIBRATION,
        LEFT_OUT,
        PROVENANCE,
        METRICS,
    )

    def inputs(self, settings: CompareBlock) -> tuple[str, ...]:
        return ("sample", "revise") if settings.revision_pairs else ("sample",)

    def optional_inputs(self, settings: CompareBlock) -> tuple[str, ...]:
        return ("sft",)

    def splits(self, settings: CompareBlock) -> tuple[Split, ...]:
        return (SPLIT,)

    def check_upstream(self, settings: CompareBlock, upstream: Mapping[str, Any]) -> list[str]:
        if not settings.revision_pairs or "revise" not in upstream or SPLIT in upstream["revise"].splits:
            return []
        return [
            f"compare.revision_pairs: no sample of the split '{SPLIT}' is revised; add it to `revise.splits` and "
            "`sample.splits`, or remove this key"
        ]

    def check(self, settings: CompareBlock, shared: Mapping[str, Any]) -> list[str]:
        from align.feedback.probes import labelling_problems

        constitution = try_load_constitution(shared["constitution"])
        return labelling_problems(constitution, shared["judge"]) if constitution else []

    def run(self, context: Context) -> Outcome:
        from align.engines.open import open_engine
        from align.feedback.agreement import agreement_figures
        from align.feedback.labelling_judge import labels_of, open_labelling_judge
        from align.feedback.tallies import ComparisonTally

        settings: CompareBlock = context.settings
        judge, report = open_labelling_judge(context, load_constitution(context.shared["constitution"]))
        with open_intake(context.output, Counter()) as intake:
            human, calibration = calibrate(judge, context, intake) if settings.calibration else ([], {})
        if processes.is_first():
            write_rows(context.output / CALIBRATION, human)
        total = count_prompts(context)
        if settings.revision_pairs:
            require_revision_pairs(context)

        policy = str(context.inputs["sft"] / "model") if "sft" in context.inputs else None
        engine = open_engine(EngineBlock(), context.shared["model"], path=policy)
        completions = text_provenance(context, "completion", engine, EngineBlock())
        labels = labels_of(context, judge, report)
        upstream = [context.inputs["revise"]] if settings.revision_pairs else []
        write_provenance(context.output, (completions, labels), upstream)
        tally = ComparisonTally([principle.id for principle in judge.principles], judge.settings)
        pairs = compare_all(context, engine, judge, total, tally, (completions.id, labels.id))

        agreement = tally.agreement.agreement()
        if processes.is_first():
            write_json(context.output / "agreement.json", agreement.as_json())
        write_constitution(context.output, judge.constitution)
        counts = {**tally.counts(), **pairs}
        shares = {name: FaultShare(tally.reasons[name], tally.comparisons) for name in ("cut", "identical")}
        figures = {"judge": report.as_figures(), **calibration, **tally.figures(), "gates": gate_figures(shares)}
        context.log_rows([{**counts, **figures}])
        check_gates(self.name, settings.gates, shares, context.output / "comparisons.jsonl")
        return Outcome(counts, {**figures, "agreement": agreement_figures(agreement)})


def compare_all(
    context: Context,
    engine: "Engine",
    judge: "Judge",
    total: int,
    tally: "ComparisonTally",
    provenance_ids: tuple[str, str],
) -> dict[str, int]:
    """Compare every prompt's completions, window by window, and write the rows; returns the number of pairs by kind.

    Args:
        total: the number of prompts.
        provenance_ids: of the completions and of the labels, for the rows.
    """
    from align.feedback.comparisons import draw_comparisons, judge_comparisons

    settings: CompareBlock = context.settings
    seed = derive_seed(context.seed, CompareStage.name)
    counts = Counter(pairs=0, revision_pairs=0)
    with LabelFiles(context.output, tally) as files:
        for window in windows(chosen_prompts(context), total, settings.window, context.output):
            drawn = draw_comparisons(window, engine, settings.sampling, settings.completions, seed)
            journal = window.folder / "verdicts.journal"
            for verdict, scores in judge_comparisons(drawn, judge, journal, f"judge{window.label}"):
                row = with_provenance(verdict, *provenance_ids)
                files.add(row, scores)
                if pair := comparison_pair(row):
                    counts["pairs"] += files.add_pair(pair)
        for pair in revision_pairs(kept_revisions(context), counts) if settings.revision_pairs else ():
            counts["revision_pairs"] += files.add_pair(pair)
    if files.repeated:
        counts["pairs_repeated"] = files.repeated
    return counts


def calibrate(judge: "Judge", context: Context, intake: Intake) -> tuple[list[JudgedPair], dict[str, Any]]:
    """The judge's verdicts on the human pairs, and its accuracy on them for the manifest. The accuracy is also printed.

    Raises:
        JudgeAtChance: the judge is not shown to agree with people often enough.
    """
    from align.feedback.human_pairs import judge_pairs, require_agreement

    block: CalibrationBlock = context.settings.calibration
    pairs = gather_pairs(None, block.human, intake)
    judged = judge_pairs(judge, pairs, context.output / "calibration.journal")
    figures = calibration_figures(judged, judge.settings.min_margin)
    if processes.is_first():
        print_calibration(figures, f"{context.run_name}, {judge.name}")
    require_agreement(judge, figures, block.min_accuracy)
    return judged, {"calibration": {**figures, "read": dict(intake.counts)}}


def chosen_prompts(context: Context) -> Iterator[Prompt]:
    """The prompts of the preference split, up to the limit."""
    path = context.inputs["sample"] / "prompts.jsonl"
    return stream_drawn_prompts(
        lambda: (prompt for prompt in read_rows(path, Prompt) if prompt.split == SPLIT),
        context.settings.limit,
        "compared",
    )


def count_prompts(context: Context) -> int:
    """The number of prompts whose completions are compared.

    Raises:
        InputError: there are none.
    """
    total = sum(1 for _ in chosen_prompts(context))
    if not total:
        raise InputError(
            f"{context.inputs['sample'] / 'prompts.jsonl'}: no prompt in the split {SPLIT}; raise "
            f"`prompts.split.{SPLIT}` or add prompts"
        )
    return total


def kept_revisions(context: Context) -> Iterator[Revision]:
    """The revisions of the preference split that revise's judge was asked about, each kept with the judge's scores.

    If revise kept no scores, these are the accepted revisions alone, and nothing is kept.
    """
    revise = context.inputs["revise"]
    settings = stage_settings(revise)
    if settings is None:
        yield from accepted_revisions(context)
        return
    with JudgedRevisionFiles(context.output, settings) as kept:
        for row, scores in judged_by_stage(revise, context.inputs["sample"] / "samples.jsonl"):
            if row.split == SPLIT:
                kept.add(row, scores)
                yield row


def accepted_revisions(context: Context) -> Iterator[Revision]:
    """The accepted revisions of the preference split."""
    rows = read_rows(context.inputs["revise"] / "revisions.jsonl", Revision)
    return (row for row in rows if row.split == SPLIT)


def require_revision_pairs(context: Context) -> None:
    """Stop before anything is generated if the recipe asks for pairs of revisions and there are none.

    Raises:
        InputError: no revision of the preference split makes a pair.
    """
    left_out: Counter[str] = Counter()
    if next(revision_pairs(accepted_revisions(context), left_out), None) is None:
        why = f" has a complete original ({dict(left_out)})" if left_out else ""
        raise InputError(
            f"{context.inputs['revise'] / 'revisions.jsonl'}: no accepted revision in the split {SPLIT}{why}; add it "
            "to `revise.splits` and `sample.splits`, raise `sample.sampling.max_new_tokens`, or remove "
            "`compare.revision_pairs`"
        )


STAGE = CompareStage()
