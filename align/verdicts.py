"""Who judges evaluated completions against the base model's, and the verdicts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.constitution import Constitution
from align.report import BASE, TIED, EvaluatedSample
from align.stage import Context
from align.statistics import Estimate


@dataclass(frozen=True)
class Judged:
    """Who judged, and its probability that each sample is better than the base model's (by id; None: it abstained)."""

    judge: str
    probes: Estimate | None
    p_better: Mapping[str, float | None]


def judge_samples(
    samples: Sequence[EvaluatedSample], constitution: Constitution | None, context: Context
) -> Judged | str:
    """The judge's verdicts on every sample against the base model's; where there can be none, why not."""
    from align.feedback.judge import examine_judge, judge_problems, open_judge

    block = context.shared.get("judge")
    policies = context.settings.reported
    if constitution is None or block is None:
        return "the recipe names no constitution" if constitution is None else "the recipe names no judge"
    if BASE not in policies or len(policies) == 1:
        return "`evaluate.policies` needs base and another one for it"
    if problems := judge_problems(constitution, block):
        return problems[0]
    judge = open_judge(block, context.shared["model"], constitution, seed=context.seed)
    found = examine_judge(judge, context.output / "probes.journal")
    if block.kind != "rule" and not block.allow_chance and found.low <= 0.5:
        return f"judge {judge.name} is not shown to be better than chance ({found})"
    probes = Estimate(found.accuracy, found.low, found.high, found.n) if found.n else None
    return Judged(judge.name, probes, _verdicts(judge, samples, context.output / "verdicts.journal"))


def _verdicts(judge: Any, samples: Sequence[EvaluatedSample], journal_path: Path) -> dict[str, float | None]:
    from align.feedback.judge import BOTH_BREAK, TIE
    from align.feedback.opinions import Question

    base = {sample.prompt_id: sample.completion for sample in samples if sample.policy == BASE}
    others = [sample for sample in samples if sample.policy != BASE]
    unlike = [sample for sample in others if sample.completion.strip() != base[sample.prompt_id].strip()]
    questions = [
        Question(sample.id, sample.prompt, sample.completion, base[sample.prompt_id], sample.category)
        for sample in unlike
    ]
    found: dict[str, float | None] = {sample.id: TIED for sample in others}
    for sample, verdict in zip(unlike, judge.compare(questions, journal_path, "judge"), strict=True):
        tied = verdict.p_a is None and verdict.reason.startswith((TIE, BOTH_BREAK))
        found[sample.id] = TIED if tied else verdict.p_a
    return found
