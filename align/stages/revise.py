"""revise: the model criticises and rewrites its own completions by the constitution; the judge accepts or rejects.

A revision is never assumed to be better (Bai et al. 2022 do): filters catch what went wrong, hard rules are checked,
and the judge must prefer it to the original. What is rejected is kept beside, with the reason. Rows stream from file to
file, a window at a time. What the judge's engine gave stands in opinions.jsonl, as compare's does.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from align.constitution.constitution import Constitution
from align.constitution.loading import load_constitution, try_load_constitution
from align.data.prompts import with_split
from align.engines.provenance import (
    CONSTITUTION,
    PROVENANCE,
    Provenance,
    label_provenance,
    pin_judge,
    text_provenance,
    write_constitution,
    write_provenance,
)
from align.errors import InputError
from align.feedback.filters import OPTIONAL, FilterName, only_refuses, refuses
from align.feedback.gates import ReviseGatesBlock, Share, TextShares, check_gates, gate_figures
from align.feedback.judged_revisions import REVISE_OPINIONS, near_duplicates, question_of, unless_repeated, with_verdict
from align.feedback.records import Critique, OpinionScores, Revision
from align.records import Prompt, Sample, Split, digest, read_rows
from align.run.reproducibility import derive_seed
from align.run.stage import Context, Outcome, Stage
from align.run.streaming import DEFAULT_WINDOW, WINDOW_HELP, RowFile, SeenOnDisk, Window, windows
from align.run.tracking import METRICS
from align.settings.blocks import Block, EngineBlock, Fraction, Integer, JudgeBlock, ModelBlock, Positive, SamplingBlock

if TYPE_CHECKING:
    from align.engines.engine import Engine
    from align.feedback.critique import Chain, Loop
    from align.feedback.judge import Judge
    from align.feedback.tallies import RevisionTally


class ReviseBlock(Block):
    """Critique and revision."""

    rounds: Positive = Field(1, description="each draws a principle of its own; the paper takes 4")
    critique: bool = Field(True, description="false asks for the revision without a critique first")
    splits: tuple[Split, ...] = Field(("sft",), description="the splits whose samples are revised")
    sampling: SamplingBlock = Field(default_factory=SamplingBlock)
    engine: EngineBlock = Field(default_factory=EngineBlock)
    critic: EngineBlock | None = Field(None, description="writes the critiques; `engine` does where this is null")
    examples: Annotated[Integer, Field(ge=0)] = Field(2, description="worked examples shown before each request")
    filters: tuple[FilterName, ...] = Field(OPTIONAL, description="besides 'cut' and 'empty', which always apply")
    principle: Literal["all", "draw"] = Field(
        "all", description="the judge averages over all principles that apply, or draws one for each revision"
    )
    near_duplicates: Fraction | None = Field(
        0.8, description="revisions that share so much with an earlier accepted one are rejected; null keeps them"
    )
    gates: ReviseGatesBlock = Field(default_factory=ReviseGatesBlock)
    window: Positive = Field(DEFAULT_WINDOW, description=WINDOW_HELP)


class ReviseStage(Stage):
    """Makes revisions of the samples, and keeps those that the judge prefers to the original."""

    name = "revise"
    help = "criticise and revise the samples by the constitution"
    settings = ReviseBlock
    shares = ("model", "constitution", "judge")
    only_gates = ("gates",)
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
            f"revise.splits: no prompt of the split '{split}' is completed; name it in `sample.splits` too"
            for split in settings.splits
            if split not in sampled
        ]

    def check(self, settings: ReviseBlock, shared: Mapping[str, Any]) -> list[str]:
        from align.feedback.critique import revising_principles
        from align.feedback.judge import labelling_problems

        constitution = try_load_constitution(shared["constitution"])
        if constitution is None:
            return _unread(settings)
        problems = [*_unread(settings), *labelling_problems(constitution, shared["judge"])]
        if not revising_principles(constitution):
            problems.append("constitution: no principle to revise by; give one a `text`, or `critique` and `revision`")
        return problems

    def run(self, context: Context) -> Outcome:
        from align.engines.open import open_engine
        from align.feedback.critique import Loop
        from align.feedback.judge import examine_judge, open_judge, require_better_than_chance
        from align.feedback.tallies import RevisionTally

        settings: ReviseBlock = context.settings
        judge_block: JudgeBlock = context.shared["judge"]
        model: ModelBlock = context.shared["model"]
        constitution = load_constitution(context.shared["constitution"])
        total = count_samples(context)
        seed = derive_seed(context.seed, self.name)

        engine = open_engine(settings.engine, model)
        judge = open_judge(
            judge_block,
            model,
            constitution,
            draw_seed=seed if settings.principle == "draw" else None,
            seed=seed,
            engine=engine if judge_block.engine == settings.engine else None,
        )
        pin_judge(judge.engine, context.output)
        report = examine_judge(judge, context.output / "probes.journal")
        require_better_than_chance(judge, report)

        critic = open_engine(settings.critic, model) if settings.critic and settings.critique else None
        critique, revision, verdict = provenance(context, critic or engine, engine, judge, report.scored_by)
        made = [each for each in (critique, revision, verdict) if each]
        write_provenance(context.output, made, [context.inputs["sample"]])
        write_constitution(context.output, constitution)
        loop = Loop(
            constitution=constitution,
            engine=engine,
            sampling=settings.sampling,
            seed=seed,
            critique=settings.critique,
            examples=settings.examples,
            filters=settings.filters,
            critic=critic,
            provenance=revision.id,
            critique_provenance=critique.id if critique else "",
        )
        tally = RevisionTally(settings.rounds)
        shares = revise_all(context, loop, judge, total, tally, verdict.id)
        measured = {"judge": report.as_figures(), **tally.figures(), "gates": gate_figures(shares | _told(tally))}
        counted = tally.counts()
        context.log_rows(_logged(counted, measured))
        check_gates(self.name, settings.gates, shares, context.output / "revisions.jsonl")
        return Outcome(counted, measured)


def _unread(settings: ReviseBlock) -> list[str]:
    """What is said and has no effect."""
    if settings.critic is None or settings.critique:
        return []
    return ["revise.critic: writes no critiques with `critique: false`; remove one of the two"]


def provenance(
    context: Context, critic: "Engine", reviser: "Engine", judge: "Judge", scored_by: str
) -> tuple[Provenance | None, Provenance, Provenance]:
    """Where critiques, revisions and verdicts come from; no critiques where none are asked for."""
    settings: ReviseBlock = context.settings
    loop: dict[str, Any] = {"critique": settings.critique, "examples": settings.examples}
    verdict = {"principle": settings.principle, "scored_by": scored_by}
    critique = None
    if settings.critique:
        writer = settings.critic or settings.engine
        critique = text_provenance(context, "critique", critic, writer, judge.constitution, **loop)
    return (
        critique,
        text_provenance(context, "revision", reviser, settings.engine, judge.constitution, **loop),
        label_provenance(context, judge.engine, judge.block, judge.constitution, **verdict),
    )


def chosen_samples(context: Context) -> Iterator[Sample]:
    """The samples of the splits that are revised, in the order of sample's own file."""
    samples = read_rows(context.inputs["sample"] / "samples.jsonl", Sample)
    return (sample for sample in samples if sample.split in context.settings.splits)


def count_samples(context: Context) -> int:
    """How many samples are revised.

    Raises:
        InputError: there are none.
    """
    total = sum(1 for _ in chosen_samples(context))
    if not total:
        raise InputError(
            f"{context.inputs['sample'] / 'samples.jsonl'}: no sample of the splits "
            f"{', '.join(context.settings.splits)}; name them in `sample.splits` too, or give more prompts"
        )
    return total


def benign_prompts(context: Context) -> SeenOnDisk:
    """Ids of the prompts whose category or file the gates name benign.

    Raises:
        InputError: a name that no prompt goes by whose sample is revised: its gate would have nothing to count.
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
            f"{', '.join(context.settings.splits)} in {path}; remove it, or give more prompts"
        )
    return benign


def _made(tally: "RevisionTally") -> dict[str, Share]:
    """What the gates limit of all the revisions that were made."""
    return {
        "cut": Share(tally.reasons["cut"], tally.samples),
        "not_accepted": Share(tally.samples - tally.accepted, tally.samples),
    }


def _told(tally: "RevisionTally") -> dict[str, Share]:
    """What is shown beside the gates and limited by none: a cut critique may still lead to a sound revision."""
    return {"critiques_cut": Share(tally.critiques_cut, tally.critiques)} if tally.critiques else {}


def revise_all(
    context: Context, loop: "Loop", judge: "Judge", total: int, tally: "RevisionTally", judge_provenance: str
) -> dict[str, Share]:
    """Revise and judge every sample, window by window, and write and count what came out; the shares for the gates."""
    settings: ReviseBlock = context.settings
    benign, benign_refused, refusal_only, texts = benign_prompts(context), Share(), Share(), TextShares()
    earlier = near_duplicates(settings.near_duplicates)
    critiques, revisions, rejected, opinions = (
        RowFile(context.output / name)
        for name in ("critiques.jsonl", "revisions.jsonl", "rejected.jsonl", REVISE_OPINIONS)
    )
    with critiques, revisions, rejected, opinions:
        for window in windows(chosen_samples(context), total, settings.window, context.output):
            for chain, judged, scores in revise_window(window, loop, judge, settings.rounds, judge_provenance):
                row = unless_repeated(judged, earlier)
                if row.accepted:
                    texts.add(row.completion)
                if chain.rounds:
                    # Whatever the filters: a recipe that leaves 'refusal' out has not asked for evasive revisions.
                    refusal_only.add(row.completion, only_refuses(row.completion))
                if row.prompt_id in benign:
                    benign_refused.add(row.completion, refuses(row.completion))
                for made in chain.rounds:
                    critiques.add(made)
                for each in scores:
                    opinions.add(each)
                (revisions if row.accepted else rejected).add(row)
                tally.add(chain, row)
    return {**texts.shares(), **_made(tally), "benign_refused": benign_refused, "refusal_only": refusal_only}


def revise_window(
    window: Window[Sample], loop: "Loop", judge: "Judge", rounds: int, judge_provenance: str
) -> Iterator[tuple["Chain", Revision, tuple[OpinionScores, ...]]]:
    """Each sample's chain, the row that it became, and the scores of its verdict: chains without a fault are compared
    with their originals."""
    loop = replace(loop, journal_path=window.folder / "steps.journal", label=window.label)
    chains = loop.run(window.rows, rounds)
    rows = [_row(chain, chain.fault or hard_rule_broken(judge.constitution, chain)) for chain in chains]
    sound = [row for row in rows if not row.reason]
    answers = judge.compare(
        map(question_of, sound), window.folder / "verdicts.journal", f"judge revisions{window.label}"
    )
    verdicts = {row.id: verdict for row, verdict in zip(sound, answers, strict=True)}
    for chain, row in zip(chains, rows, strict=True):
        if verdict := verdicts.get(row.id):
            yield chain, replace(with_verdict(row, verdict), judge_provenance=judge_provenance), verdict.scores
        else:
            yield chain, row, ()


def hard_rule_broken(constitution: Constitution, chain: "Chain") -> str:
    """Which hard principle's rule the completion breaks, in words; empty where it keeps them all."""
    from align.feedback.judge import broken_rule

    hard = [each for each in constitution.principles if each.hard and each.applies_to(chain.sample.category)]
    broken = broken_rule(hard, chain.completion)
    return f"breaks {broken.id}" if broken else ""


def _logged(counted: Mapping[str, int], measured: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each round; the last holds what is known at the end too, counts as shares of the samples."""
    *rows, last = ({"round": figures} for figures in measured["by_round"])
    shares = {name: count / counted["samples"] for name, count in counted.items() if name != "samples"}
    known = {name: value for name, value in measured.items() if name != "by_round"}
    return [*rows, {**last, "samples": counted["samples"], **shares, **known}]


def _row(chain: "Chain", fault: str) -> Revision:
    """What a chain became, rejected for its fault; without one it is still to be judged."""
    led = _leading_rounds(chain)
    shown = led[-1] if led else None
    return Revision(
        id=digest([chain.sample.id, "revision"]),
        prompt_id=chain.sample.prompt_id,
        prompt=chain.sample.prompt,
        original=chain.sample.completion,
        original_cut=chain.sample.finish_reason == "length",
        completion=shown.revision.strip() if chain.fault and shown else chain.completion,
        principle_ids=chain.principle_ids,
        p_better=0.5,
        accepted=False,
        reason=fault,
        split=chain.sample.split,
        category=chain.sample.category,
        seed=shown.seed if shown else chain.sample.seed,
        provenance=shown.provenance if shown else chain.sample.provenance,
        original_seed=chain.sample.seed,
        original_provenance=chain.sample.provenance,
        sample_id=chain.sample.id,
        revised_by=tuple(made.principle_id for made in led),
    )


def _leading_rounds(chain: "Chain") -> list[Critique]:
    """The rounds that led to the completion that the row shows, which is the last one's revision: those whose revision
    took the completion's place, or of a faulty chain the last. There are none where no principle applied."""
    if chain.fault:
        return list(chain.rounds[-1:])
    return [made for made, fault in zip(chain.rounds, chain.faults, strict=True) if not fault]


STAGE = ReviseStage()
