"""compare: the SFT policy answers each prompt twice, and the judge says which answer follows the constitution better.

The labels are soft (Bai et al. 2022, section 4.1): the reward model and DPO are trained on probabilities. Ties, cut,
empty and identical completions stay in comparisons.jsonl with the reason, and make no pair. What the judge's engine
gave stands in opinions.jsonl, and the principles in constitution.json: `align relabel` makes labels of them again. What
revise's judge gave for revisions that may become pairs is kept beside it. Rows stream from file to file, a window at a
time.
"""

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from align.constitution.loading import load_constitution, try_load_constitution
from align.data.pairs import gather_pairs
from align.data.prompts import stream_drawn_prompts
from align.engines.engine import Completed, Request
from align.engines.provenance import (
    CONSTITUTION,
    PROVENANCE,
    label_provenance,
    pin_judge,
    text_provenance,
    write_constitution,
    write_provenance,
)
from align.errors import InputError
from align.feedback.calibration import JudgedPair, calibration_figures, print_calibration
from align.feedback.gates import CompareGatesBlock, Share, check_gates, gate_figures
from align.feedback.judged_revisions import FILES as REVISION_FILES
from align.feedback.judged_revisions import KeptRevisions, judged_in, settings_of
from align.feedback.label_files import LabelFiles
from align.feedback.preference_pairs import pair_of, question_of, revision_pairs, with_provenance, with_verdict
from align.feedback.records import Comparison, OpinionScores, Revision
from align.records import Prompt, Split, digest, read_rows, write_rows
from align.run import processes
from align.run.artefacts import write_json
from align.run.reproducibility import derive_seed
from align.run.stage import Context, Outcome, Stage
from align.run.streaming import DEFAULT_WINDOW, WINDOW_HELP, Window, windows
from align.run.tracking import METRICS
from align.settings.blocks import (
    Block,
    EngineBlock,
    Fraction,
    Integer,
    JudgeBlock,
    ModelBlock,
    PairSource,
    Positive,
    SamplingBlock,
)

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
        0.5, description="the 95% interval of the judge's accuracy on them must lie above this"
    )


class CompareBlock(Block):
    """Preference labels by the judge."""

    sampling: SamplingBlock = Field(default_factory=SamplingBlock)
    completions: Annotated[Integer, Field(ge=2)] = Field(2, description="a prompt; each is compared with each")
    revision_pairs: bool = Field(False, description="add accepted revisions over their originals that were not cut")
    limit: Positive | None = Field(None, description="at most this many prompts, drawn by their content")
    principle: Literal["all", "draw"] = Field(
        "all", description="the judge averages over all principles that apply, or draws one for each comparison"
    )
    calibration: CalibrationBlock | None = Field(
        None, description="test the judge on human pairs first; `judge.allow_chance` goes on all the same"
    )
    gates: CompareGatesBlock = Field(default_factory=CompareGatesBlock)
    window: Positive = Field(DEFAULT_WINDOW, description=WINDOW_HELP)


class CompareStage(Stage):
    """Labels pairs of the SFT policy's completions by the constitution."""

    name = "compare"
    help = "label pairs of the SFT policy's completions by the constitution"
    settings = CompareBlock
    shares = ("model", "constitution", "judge")
    only_gates = ("gates",)
    outputs = (
        "comparisons.jsonl",
        "pairs.jsonl",
        "opinions.jsonl",
        *REVISION_FILES,
        CONSTITUTION,
        "agreement.json",
        CALIBRATION,
        PROVENANCE,
        METRICS,
    )

    def inputs(self, settings: CompareBlock) -> tuple[str, ...]:
        return ("sample", "revise", "sft") if settings.revision_pairs else ("sample", "sft")

    def splits(self, settings: CompareBlock) -> tuple[Split, ...]:
        return (SPLIT,)

    def check_upstream(self, settings: CompareBlock, upstream: Mapping[str, Any]) -> list[str]:
        if not settings.revision_pairs or "revise" not in upstream or SPLIT in upstream["revise"].splits:
            return []
        return [
            f"compare.revision_pairs: no sample of the split '{SPLIT}' is revised; name it in `revise.splits` and "
            "`sample.splits`, or leave this out"
        ]

    def check(self, settings: CompareBlock, shared: Mapping[str, Any]) -> list[str]:
        from align.feedback.judge import labelling_problems

        constitution = try_load_constitution(shared["constitution"])
        return labelling_problems(constitution, shared["judge"]) if constitution else []

    def run(self, context: Context) -> Outcome:
        from align.engines.open import open_engine
        from align.feedback.agreement import agreement_figures
        from align.feedback.judge import examine_judge, open_judge, require_better_than_chance
        from align.feedback.tallies import ComparisonTally

        settings: CompareBlock = context.settings
        judge_block: JudgeBlock = context.shared["judge"]
        model: ModelBlock = context.shared["model"]
        seed = derive_seed(context.seed, self.name)
        judge = open_judge(
            judge_block,
            model,
            load_constitution(context.shared["constitution"]),
            draw_seed=seed if settings.principle == "draw" else None,
            seed=seed,
        )
        pin_judge(judge.engine, context.output)
        report = examine_judge(judge, context.output / "probes.journal")
        require_better_than_chance(judge, report)
        human, tested = calibrate(judge, context) if settings.calibration else ([], {})

        if processes.is_first():
            write_rows(context.output / CALIBRATION, human)
        total = count_prompts(context)
        if settings.revision_pairs:
            require_revision_pairs(context)
        engine = open_engine(EngineBlock(), model, path=str(context.inputs["sft"] / "model"))
        tally = ComparisonTally([principle.id for principle in judge.principles], judge.block)
        named = provenance(context, engine, judge, report.scored_by)
        pairs = compare_all(context, engine, judge, total, tally, named)
        agreement = tally.agreement.agreement()
        if processes.is_first():
            write_json(context.output / "agreement.json", agreement.as_json())
        write_constitution(context.output, judge.constitution)
        counted = {**tally.counts(), **pairs}
        shares = {name: Share(tally.reasons[name], tally.comparisons) for name in ("cut", "identical")}
        measured = {"judge": report.as_figures(), **tested, **tally.figures(), "gates": gate_figures(shares)}
        context.log_rows([{**counted, **measured}])
        check_gates(self.name, settings.gates, shares, context.output / "comparisons.jsonl")
        return Outcome(counted, {**measured, "agreement": agreement_figures(agreement)})


def provenance(context: Context, engine: "Engine", judge: "Judge", scored_by: str) -> tuple[str, str]:
    """Write where completions and labels come from, and the entries that revision pairs name; the ids of the two."""
    settings: CompareBlock = context.settings
    how = {"principle": settings.principle, "scored_by": scored_by}
    made = (
        text_provenance(context, "completion", engine, EngineBlock()),
        label_provenance(context, judge.engine, judge.block, judge.constitution, **how),
    )
    write_provenance(context.output, made, [context.inputs["revise"]] if settings.revision_pairs else [])
    return made[0].id, made[1].id


def compare_all(
    context: Context,
    engine: "Engine",
    judge: "Judge",
    total: int,
    tally: "ComparisonTally",
    named: tuple[str, str],
) -> dict[str, int]:
    """Compare every prompt's completions, window by window, and write and count what came out; how many pairs of each
    kind there are.

    Args:
        named: the provenance that rows name for completions and for labels.
    """
    settings: CompareBlock = context.settings
    counted = Counter(pairs=0, revision_pairs=0)
    with LabelFiles(context.output, tally) as files:
        for window in windows(chosen_prompts(context), total, settings.window, context.output):
            journal = window.folder / "verdicts.journal"
            for verdict, scores in label(compared(window, context, engine), judge, journal, f"judge{window.label}"):
                row = with_provenance(verdict, *named)
                files.add(row, scores)
                if pair := pair_of(row):
                    counted["pairs"] += files.add_pair(pair)
        for pair in revision_pairs(kept_revisions(context), counted) if settings.revision_pairs else ():
            counted["revision_pairs"] += files.add_pair(pair)
    if files.repeated:
        counted["pairs_repeated"] = files.repeated
    return counted


def calibrate(judge: "Judge", context: Context) -> tuple[list[JudgedPair], dict[str, Any]]:
    """What the judge says of the human pairs, and what it is worth on them: shown, and for the manifest.

    Raises:
        JudgeAtChance: it is not shown to agree with people often enough.
    """
    from align.feedback.human_pairs import judge_pairs, require_agreement

    block: CalibrationBlock = context.settings.calibration
    left_out: Counter[str] = Counter()
    pairs = gather_pairs(None, block.human, left_out)
    judged = judge_pairs(judge, pairs, context.output / "calibration.journal")
    found = calibration_figures(judged, judge.block.min_margin)
    if processes.is_first():
        print_calibration(found, f"{context.run_name}, {judge.name}")
    require_agreement(judge, found, block.min_accuracy)
    return judged, {"calibration": {**found, "read": dict(left_out)}}


def compared(window: Window[Prompt], context: Context, engine: "Engine") -> list[Comparison]:
    """Pairs of the SFT policy's completions, not judged yet; those not worth judging say why."""
    from align.engines.complete_all import complete_all

    settings: CompareBlock = context.settings
    seed = derive_seed(context.seed, CompareStage.name)
    numbers = range(settings.completions)
    done = complete_all(
        engine,
        [_request(prompt, number, settings.sampling, seed) for prompt in window.rows for number in numbers],
        settings.sampling.batch_size,
        window.folder / "completions.journal",
        f"{'two' if settings.completions == 2 else settings.completions} answers a prompt{window.label}",
    )
    return [
        _comparison(prompt, (first, second), done, seed)
        for prompt in window.rows
        for first, second in itertools.combinations(numbers, 2)
    ]


def chosen_prompts(context: Context) -> Iterator[Prompt]:
    """The prompts of the preference split, up to the limit."""
    path = context.inputs["sample"] / "prompts.jsonl"
    return stream_drawn_prompts(
        lambda: (prompt for prompt in read_rows(path, Prompt) if prompt.split == SPLIT),
        context.settings.limit,
        "compared",
    )


def count_prompts(context: Context) -> int:
    """How many prompts are compared.

    Raises:
        InputError: there are none.
    """
    total = sum(1 for _ in chosen_prompts(context))
    if not total:
        raise InputError(
            f"{context.inputs['sample'] / 'prompts.jsonl'}: no prompt in the split {SPLIT}; raise "
            f"`prompts.split.{SPLIT}` or give more prompts"
        )
    return total


def label(
    comparisons: Sequence[Comparison], judge: "Judge", journal_path: Path, description: str
) -> list[tuple[Comparison, tuple[OpinionScores, ...]]]:
    """The comparisons with the judge's verdicts, each with the scores that its verdict was made of."""
    judged = [row for row in comparisons if not row.reason]
    questions = [question_of(row) for row in judged]
    answers = judge.compare(questions, journal_path, description)
    verdicts = {row.id: verdict for row, verdict in zip(judged, answers, strict=True)}
    return [
        (with_verdict(row, verdict, judge.name), verdict.scores) if (verdict := verdicts.get(row.id)) else (row, ())
        for row in comparisons
    ]


def kept_revisions(context: Context) -> Iterator[Revision]:
    """The revisions of the preference split that came before revise's judge, kept with its scores as they pass; where
    there are none of those, the accepted ones alone."""
    revise = context.inputs["revise"]
    settings = settings_of(revise)
    if settings is None:
        yield from accepted_revisions(context)
        return
    with KeptRevisions(context.output, settings) as kept:
        for row, scores in judged_in(revise, context.inputs["sample"] / "samples.jsonl"):
            if row.split == SPLIT:
                kept.add(row, scores)
                yield row


def accepted_revisions(context: Context) -> Iterator[Revision]:
    """Those of the preference split."""
    rows = read_rows(context.inputs["revise"] / "revisions.jsonl", Revision)
    return (row for row in rows if row.split == SPLIT)


def require_revision_pairs(context: Context) -> None:
    """Stop before anything is asked where pairs are to be made of revisions and there are none.

    Raises:
        InputError: revise made none of the preference split.
    """
    left_out: Counter[str] = Counter()
    if next(revision_pairs(accepted_revisions(context), left_out), None) is None:
        why = f" of an original that ended by itself ({dict(left_out)})" if left_out else ""
        raise InputError(
            f"{context.inputs['revise'] / 'revisions.jsonl'}: no accepted revision in the split {SPLIT}{why}; name it "
            "in `revise.splits` and `sample.splits`, raise `sample.sampling.max_new_tokens`, or leave out "
            "`compare.revision_pairs`"
        )


def _request(prompt: Prompt, number: int, sampling: SamplingBlock, seed: int) -> Request:
    return Request(
        id=f"{prompt.id}/{number}",
        messages=prompt.prompt,
        seed=_seed(prompt, number, seed),
        max_new_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
    )


def _seed(prompt: Prompt, number: int, seed: int) -> int:
    return derive_seed(seed, prompt.id, number)


def _comparison(prompt: Prompt, numbers: tuple[int, int], done: Mapping[str, Completed], seed: int) -> Comparison:
    a, b = (done[f"{prompt.id}/{number}"] for number in numbers)
    return Comparison(
        id=digest([prompt.id, "comparison", *numbers]),
        prompt_id=prompt.id,
        prompt=prompt.prompt,
        completion_a=a.text.strip(),
        completion_b=b.text.strip(),
        p_a=None,
        reason=_not_worth_judging(a, b),
        category=prompt.category,
        seed_a=_seed(prompt, numbers[0], seed),
        seed_b=_seed(prompt, numbers[1], seed),
    )


def _not_worth_judging(a: Completed, b: Completed) -> str:
    if "length" in (a.finish_reason, b.finish_reason):
        return "cut"
    if not a.text.strip() or not b.text.strip():
        return "empty"
    return "identical" if a.text.strip() == b.text.strip() else ""


STAGE = CompareStage()
