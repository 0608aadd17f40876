"""compare: the SFT policy answers each prompt twice, and the judge says which answer follows the constitution better.

The labels are soft (Bai et al. 2022, section 4.1): the reward model and DPO are trained on probabilities. Ties, cut,
empty and identical completions stay in comparisons.jsonl with the reason, and make no pair. What the judge's engine
gave stands in opinions.jsonl, and the principles in constitution.json: `align relabel` makes labels of them again.
"""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from align import processes
from align.artefacts import write_json
from align.config import Block, EngineBlock, Integer, JudgeBlock, ModelBlock, Positive, SamplingBlock
from align.constitution import load_constitution
from align.data.prompts import drawn_prompts
from align.errors import InputError
from align.generation import Completed, Request
from align.records import (
    Comparison,
    Message,
    OpinionScores,
    PreferencePair,
    Prompt,
    Revision,
    Split,
    as_dicts,
    digest,
    read_rows,
    write_rows,
)
from align.repro import derive_seed
from align.stage import Context, Outcome, Stage
from align.tracking import METRICS

if TYPE_CHECKING:
    from align.feedback.judge import Judge

SPLIT: Split = "preference"


class CompareBlock(Block):
    """Preference labels by the judge."""

    sampling: SamplingBlock = Field(default_factory=SamplingBlock)
    completions: Annotated[Integer, Field(ge=2)] = Field(2, description="a prompt; each is compared with each")
    revision_pairs: bool = Field(False, description="add accepted revisions over their originals as pairs")
    limit: Positive | None = Field(None, description="at most this many prompts, drawn by their content")
    principle: Literal["all", "draw"] = Field(
        "all", description="the judge averages over all principles that apply, or draws one for each comparison"
    )


class CompareStage(Stage):
    """Labels pairs of the SFT policy's completions by the constitution."""

    name = "compare"
    help = "label pairs of the SFT policy's completions by the constitution"
    settings = CompareBlock
    shares = ("model", "constitution", "judge")
    outputs = ("comparisons.jsonl", "pairs.jsonl", "opinions.jsonl", "constitution.json", METRICS)

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
        from align.feedback.judge import judge_problems, probe_problems

        try:
            constitution = load_constitution(shared["constitution"])
        except InputError:
            return []
        return judge_problems(constitution, shared["judge"]) or probe_problems(constitution, shared["judge"])

    def run(self, context: Context) -> Outcome:
        from align.feedback.judge import examine_judge, open_judge, require_better_than_chance

        settings: CompareBlock = context.settings
        judge_block: JudgeBlock = context.shared["judge"]
        seed = derive_seed(context.seed, self.name)
        judge = open_judge(
            judge_block,
            context.shared["model"],
            load_constitution(context.shared["constitution"]),
            draw_seed=seed if settings.principle == "draw" else None,
            seed=seed,
        )
        report = examine_judge(judge, context.output / "probes.journal")
        require_better_than_chance(judge, report)

        comparisons, opinions = label(compared(context, seed), judge, context.output / "verdicts.journal")
        pairs = [pair for row in comparisons if (pair := pair_of(row))]
        extra = revision_pairs(context) if settings.revision_pairs else []
        if processes.is_first():
            write_rows(context.output / "comparisons.jsonl", comparisons)
            write_rows(context.output / "pairs.jsonl", {pair.id: pair for pair in (*pairs, *extra)}.values())
            write_rows(context.output / "opinions.jsonl", opinions)
            write_json(context.output / "constitution.json", judge.constitution.model_dump(mode="json"))
        counted = {
            **counts(comparisons),
            **opinion_counts(comparisons, opinions),
            "pairs": len(pairs),
            "revision_pairs": len(extra),
        }
        measured = {"judge": report.as_figures(), **figures(comparisons), **option_figures(opinions)}
        context.log_rows([{**counted, **measured}])
        return Outcome(counted, measured)


def compared(context: Context, seed: int) -> list[Comparison]:
    """Pairs of the SFT policy's completions, not judged yet; those not worth judging say why."""
    from align.backends.complete_all import complete_all
    from align.backends.open import open_backend

    settings: CompareBlock = context.settings
    model: ModelBlock = context.shared["model"]
    prompts = chosen_prompts(context)
    requests = {
        (prompt.id, number): _request(prompt, number, settings.sampling, seed)
        for prompt in prompts
        for number in range(settings.completions)
    }
    backend = open_backend(EngineBlock(), model, path=str(context.inputs["sft"] / "model"))
    done = complete_all(
        backend,
        list(requests.values()),
        settings.sampling.batch_size,
        context.output / "completions.journal",
        "two answers a prompt" if settings.completions == 2 else f"{settings.completions} answers a prompt",
    )
    return [
        _comparison(prompt, (first, second), done)
        for prompt in prompts
        for first, second in itertools.combinations(range(settings.completions), 2)
    ]


def chosen_prompts(context: Context) -> list[Prompt]:
    """The prompts of the preference split, up to the limit.

    Raises:
        InputError: there are none.
    """
    path = context.inputs["sample"] / "prompts.jsonl"
    prompts = [prompt for prompt in read_rows(path, Prompt) if prompt.split == SPLIT]
    if not prompts:
        raise InputError(f"{path}: no prompt in the split {SPLIT}; raise `prompts.split.{SPLIT}` or give more prompts")
    return drawn_prompts(prompts, context.settings.limit, "compared")


def label(
    comparisons: Sequence[Comparison], judge: "Judge", journal_path: Path | None = None
) -> tuple[list[Comparison], list[OpinionScores]]:
    """The comparisons with the judge's verdicts, and the scores that these were made of."""
    from align.feedback.opinions import Question

    judged = [row for row in comparisons if not row.reason]
    questions = [Question(row.id, row.prompt, row.completion_a, row.completion_b, row.category) for row in judged]
    answers = judge.compare(questions, journal_path, "judge")
    verdicts = {row.id: verdict for row, verdict in zip(judged, answers, strict=True)}
    labelled = [
        replace(
            row,
            p_a=verdict.p_a,
            p_a_by_principle=verdict.by_principle,
            position_bias=verdict.position_bias,
            reason=verdict.reason,
            judge=judge.name,
        )
        if (verdict := verdicts.get(row.id))
        else row
        for row in comparisons
    ]
    return labelled, [scores for verdict in answers for scores in verdict.scores]


def pair_of(row: Comparison) -> PreferencePair | None:
    """The comparison as a training pair; None where it was not decided."""
    if row.p_a is None:
        return None
    a, b = Message("assistant", row.completion_a), Message("assistant", row.completion_b)
    chosen, rejected = (a, b) if row.p_a >= 0.5 else (b, a)
    return PreferencePair(
        id=pair_id(row.prompt, chosen, rejected),
        prompt=row.prompt,
        chosen=(chosen,),
        rejected=(rejected,),
        probability=max(row.p_a, 1 - row.p_a),
        source="ai",
        category=row.category,
    )


def revision_pairs(context: Context) -> list[PreferencePair]:
    """Accepted revisions of the preference split over their originals.

    Raises:
        InputError: revise made none of that split.
    """
    path = context.inputs["revise"] / "revisions.jsonl"
    revisions = [row for row in read_rows(path, Revision) if row.accepted and row.split == SPLIT]
    if not revisions:
        raise InputError(
            f"{path}: no accepted revision in the split {SPLIT}; name it in `revise.splits` and `sample.splits`, "
            "or leave out `compare.revision_pairs`"
        )
    return [
        PreferencePair(
            id=pair_id(row.prompt, chosen, rejected),
            prompt=row.prompt,
            chosen=(chosen,),
            rejected=(rejected,),
            probability=row.p_better,
            source="revision",
            category=row.category,
        )
        for row in revisions
        for chosen, rejected in [(Message("assistant", row.completion), Message("assistant", row.original))]
    ]


def pair_id(prompt: Sequence[Message], chosen: Message, rejected: Message) -> str:
    return digest([as_dicts(tuple(prompt)), chosen.as_dict(), rejected.as_dict()])


def counts(comparisons: Sequence[Comparison]) -> dict[str, int]:
    """How many comparisons were decided, and how many were not for each reason."""
    reasons = Counter(row.reason for row in comparisons if row.p_a is None)
    undecided = {f"undecided: {reason}": count for reason, count in sorted(reasons.items())}
    return {"comparisons": len(comparisons), "decided": len(comparisons) - sum(reasons.values()), **undecided}


def opinion_counts(comparisons: Sequence[Comparison], opinions: Sequence[OpinionScores]) -> dict[str, int]:
    """How many opinions an engine was asked for, one for each comparison and principle, and how many it abstained
    from."""
    asked = {(row.comparison_id, row.principle_id) for row in opinions}
    given = {(row.id, name) for row in comparisons for name in row.p_a_by_principle}
    return {"opinions": len(asked), "opinions_abstained": len(asked - given)} if asked else {}


def option_figures(opinions: Sequence[OpinionScores]) -> dict[str, float]:
    """Mean probability of the two letters together, of a judge that chooses."""
    masses = [row.option_mass for row in opinions if row.option_mass is not None]
    return {"option_mass": sum(masses) / len(masses)} if masses else {}


def figures(comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """Shares among the decided comparisons: what a judge that only looks at place or length would show, and how sure
    the labels are; and the share of all that was left undecided."""
    decided = [row for row in comparisons if row.p_a is not None]
    if not decided:
        return {}
    sure = [max(row.p_a or 0.0, 1 - (row.p_a or 0.0)) for row in decided]
    tenths = Counter(min(int(10 * p), 9) for p in sure)
    a_wins = [row.p_a is not None and row.p_a > 0.5 for row in decided]
    longer = [_longer_won(row, won) for row, won in zip(decided, a_wins, strict=True)]
    return {
        "a_chosen": sum(a_wins) / len(decided),
        "longer_chosen": sum(longer) / len(decided),
        "position_bias": sum(row.position_bias for row in decided) / len(decided),
        "mean_probability": sum(sure) / len(decided),
        "probability": {f"{10 * tenth}-{10 * tenth + 10}%": tenths[tenth] / len(decided) for tenth in range(5, 10)},
        "undecided": 1 - len(decided) / len(comparisons),
    }


def _longer_won(row: Comparison, a_won: bool) -> float:
    """1 where the longer completion was preferred, one half where both are as long."""
    difference = len(row.completion_a) - len(row.completion_b)
    return 0.5 if difference == 0 else float((difference > 0) == a_won)


def _request(prompt: Prompt, number: int, sampling: SamplingBlock, seed: int) -> Request:
    return Request(
        id=f"{prompt.id}/{number}",
        messages=prompt.prompt,
        seed=derive_seed(seed, prompt.id, number),
        max_new_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
    )


def _comparison(prompt: Prompt, numbers: tuple[int, int], done: Mapping[str, Completed]) -> Comparison:
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
    )


def _not_worth_judging(a: Completed, b: Completed) -> str:
    if "length" in (a.finish_reason, b.finish_reason):
        return "cut"
    if not a.text.strip() or not b.text.strip():
        return "empty"
    return "identical" if a.text.strip() == b.text.strip() else ""


STAGE = CompareStage()
