"""revise: the model criticises and rewrites its own completions by the constitution; the judge accepts or rejects.

A revision is never assumed to be better (Bai et al. 2022 do): filters catch what went wrong, hard rules are checked,
and the judge must prefer it to the original. What is rejected is kept beside, with the reason.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from align import processes
from align.config import Block, EngineBlock, Integer, JudgeBlock, ModelBlock, Positive, SamplingBlock
from align.constitution import Constitution, load_constitution
from align.errors import InputError
from align.feedback.filters import OPTIONAL, FilterName
from align.records import Revision, Sample, Split, digest, read_rows, write_rows
from align.repro import derive_seed
from align.stage import Context, Outcome, Stage
from align.tracking import METRICS

if TYPE_CHECKING:
    from align.feedback.critique import Chain
    from align.feedback.judge import Judge, Verdict


class ReviseBlock(Block):
    """Critique and revision."""

    rounds: Positive = Field(1, description="each draws a principle of its own; the paper takes 4")
    critique: bool = Field(True, description="false asks for the revision without a critique first")
    splits: tuple[Split, ...] = Field(("sft",), description="the splits whose samples are revised")
    sampling: SamplingBlock = Field(default_factory=SamplingBlock)
    engine: EngineBlock = Field(default_factory=EngineBlock)
    examples: Annotated[Integer, Field(ge=0)] = Field(2, description="worked examples shown before each request")
    filters: tuple[FilterName, ...] = Field(OPTIONAL, description="besides 'cut' and 'empty', which always apply")
    principle: Literal["all", "draw"] = Field(
        "all", description="the judge averages over all principles that apply, or draws one for each revision"
    )


class ReviseStage(Stage):
    """Makes revisions of the samples, and keeps those that the judge prefers to the original."""

    name = "revise"
    help = "criticise and revise the samples by the constitution"
    settings = ReviseBlock
    shares = ("model", "constitution", "judge")
    outputs = ("critiques.jsonl", "revisions.jsonl", "rejected.jsonl", METRICS)

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
        from align.feedback.judge import judge_problems, probe_problems

        try:
            constitution = load_constitution(shared["constitution"])
        except InputError:
            return []
        problems = judge_problems(constitution, shared["judge"]) or probe_problems(constitution, shared["judge"])
        if not revising_principles(constitution):
            problems.append("constitution: no principle to revise by; give one a `text`, or `critique` and `revision`")
        return problems

    def run(self, context: Context) -> Outcome:
        from align.backends.open import open_backend
        from align.feedback.critique import Loop
        from align.feedback.judge import examine_judge, open_judge, require_better_than_chance

        settings: ReviseBlock = context.settings
        judge_block: JudgeBlock = context.shared["judge"]
        model: ModelBlock = context.shared["model"]
        constitution = load_constitution(context.shared["constitution"])
        samples = chosen_samples(context, settings.splits)
        seed = derive_seed(context.seed, self.name)

        backend = open_backend(settings.engine, model)
        judge = open_judge(
            judge_block,
            model,
            constitution,
            draw_seed=seed if settings.principle == "draw" else None,
            seed=seed,
            backend=backend if judge_block.engine == settings.engine else None,
        )
        report = examine_judge(judge, context.output / "probes.journal")
        require_better_than_chance(judge, report)

        loop = Loop(
            constitution=constitution,
            backend=backend,
            sampling=settings.sampling,
            seed=seed,
            journal_path=context.output / "steps.journal",
            critique=settings.critique,
            examples=settings.examples,
            filters=settings.filters,
        )
        judged = judge_chains(loop.run(samples, settings.rounds), judge, context)
        if processes.is_first():
            write_rows(context.output / "critiques.jsonl", [row for each in judged for row in each.chain.rounds])
            write_rows(context.output / "revisions.jsonl", [each.row for each in judged if each.row.accepted])
            write_rows(context.output / "rejected.jsonl", [each.row for each in judged if not each.row.accepted])
        counted, measured = counts(judged), {"judge": report.as_figures(), **figures(judged, settings.rounds)}
        context.log_rows(_logged(counted, measured))
        return Outcome(counted, measured)


@dataclass(frozen=True)
class Judged:
    """A chain and the row that it became."""

    chain: "Chain"
    row: Revision


def chosen_samples(context: Context, splits: Sequence[Split]) -> list[Sample]:
    """The samples of these splits, in the order of sample's own file.

    Raises:
        InputError: there are none.
    """
    path = context.inputs["sample"] / "samples.jsonl"
    samples = [sample for sample in read_rows(path, Sample) if sample.split in splits]
    if not samples:
        raise InputError(
            f"{path}: no sample of the splits {', '.join(splits)}; name them in `sample.splits` too, "
            "or give more prompts"
        )
    return samples


def judge_chains(chains: Sequence["Chain"], judge: "Judge", context: Context) -> list[Judged]:
    """Rows of the chains: those without a fault are compared with their originals, and kept where they are better."""
    from align.feedback.opinions import Question

    faults = {chain.sample.id: chain.fault or hard_rule_broken(judge.constitution, chain) for chain in chains}
    sound = [chain for chain in chains if not faults[chain.sample.id]]
    questions = [
        Question(chain.sample.id, chain.sample.prompt, chain.completion, chain.sample.completion, chain.sample.category)
        for chain in sound
    ]
    answers = judge.compare(questions, context.output / "verdicts.journal", "judge revisions")
    verdicts = {chain.sample.id: verdict for chain, verdict in zip(sound, answers, strict=True)}
    return [Judged(chain, _row(chain, faults[chain.sample.id], verdicts.get(chain.sample.id))) for chain in chains]


def hard_rule_broken(constitution: Constitution, chain: "Chain") -> str:
    """Which hard principle's rule the completion breaks, in words; empty where it keeps them all."""
    from align.feedback.judge import broken_rule

    hard = [each for each in constitution.principles if each.hard and each.applies_to(chain.sample.category)]
    broken = broken_rule(hard, chain.completion)
    return f"breaks {broken.id}" if broken else ""


def counts(judged: Sequence[Judged]) -> dict[str, int]:
    """How many were accepted, and how many rejected for each reason."""
    reasons = Counter(each.row.reason for each in judged if not each.row.accepted)
    return {
        "samples": len(judged),
        "accepted": sum(each.row.accepted for each in judged),
        "rejected": sum(reasons.values()),
        **{f"rejected: {reason}": count for reason, count in sorted(reasons.items())},
        "preambles_removed": sum(each.chain.preambles for each in judged),
    }


def figures(judged: Sequence[Judged], rounds: int) -> dict[str, Any]:
    """By principle: draws, filtered revisions, accepted chains. By round: see `_of_round`."""
    draws, filtered, accepted = Counter[str](), Counter[str](), Counter[str]()
    for each in judged:
        for step, fault in zip(each.chain.rounds, each.chain.faults, strict=True):
            draws[step.principle_id] += 1
            filtered[step.principle_id] += bool(fault)
            accepted[step.principle_id] += each.row.accepted
    by_round = [_of_round(judged, number) for number in range(rounds)]
    return {
        "by_principle": {
            name: {"draws": draws[name], "filtered": filtered[name], "accepted": accepted[name]}
            for name in sorted(draws)
        },
        "by_round": by_round,
        "original_characters": _mean([len(each.chain.sample.completion) for each in judged]),
    }


def _of_round(judged: Sequence[Judged], number: int) -> dict[str, float]:
    """Mean length in characters, share that a filter caught, and of the chains that end with this round's revision how
    many there are and what share was accepted."""
    reached = [each.chain for each in judged if len(each.chain.rounds) > number]
    last = [each.row.accepted for each in judged if _last_round(each.chain) == number]
    return {
        "characters": _mean([len(chain.rounds[number].revision) for chain in reached]),
        "filtered": _mean([bool(chain.faults[number]) for chain in reached]),
        "last": len(last),
        "last_accepted": _mean(last),
    }


def _last_round(chain: "Chain") -> int | None:
    """The round whose revision stands at the chain's end; None where every one was caught."""
    return max((number for number, fault in enumerate(chain.faults) if not fault), default=None)


def _logged(counted: Mapping[str, int], measured: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each round; the last holds what is known at the end too, counts as shares of the samples."""
    *rows, last = ({"round": figures} for figures in measured["by_round"])
    shares = {name: count / counted["samples"] for name, count in counted.items() if name != "samples"}
    known = {name: value for name, value in measured.items() if name != "by_round"}
    return [*rows, {**last, "samples": counted["samples"], **shares, **known}]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _row(chain: "Chain", fault: str, verdict: "Verdict | None") -> Revision:
    p_better = verdict.p_a if verdict and verdict.p_a is not None else 0.5
    accepted = not fault and p_better > 0.5
    reason = fault or (verdict.reason if verdict else "") or "judged worse"
    return Revision(
        id=digest([chain.sample.id, "revision"]),
        prompt_id=chain.sample.prompt_id,
        prompt=chain.sample.prompt,
        original=chain.sample.completion,
        completion=chain.rounds[-1].revision.strip() if chain.fault and chain.rounds else chain.completion,
        principle_ids=chain.principle_ids,
        p_better=p_better,
        accepted=accepted,
        reason="" if accepted else reason,
        split=chain.sample.split,
        category=chain.sample.category,
    )


STAGE = ReviseStage()
