"""Who judges evaluated completions against the base model's, and the verdicts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from align.constitution.constitution import Constitution
from align.engines.provenance import Provenance, label_provenance, settle_judge
from align.evaluation.report import BASE, TIED, EvaluatedSample
from align.figures.statistics import Estimate
from align.run.stage import Context

if TYPE_CHECKING:
    from align.feedback.judge import Verdict
    from align.feedback.opinions import Question


@dataclass(frozen=True)
class Judged:
    """Who judged, how that is told, and the verdicts on the samples that differ from the base model's, by their ids."""

    judge: str
    probes: Estimate | None
    provenance: Provenance
    verdicts: "Mapping[str, Verdict]"

    def beside(self, sample: EvaluatedSample) -> EvaluatedSample:
        """The sample with what the judge said of it. One that says the same as the base model's is a tie."""
        if sample.policy == BASE:
            return sample
        if sample.id not in self.verdicts:
            return replace(sample, p_better=TIED)
        verdict = self.verdicts[sample.id]
        return replace(
            sample,
            p_better=_p_better(verdict),
            judged_by=verdict.decided_by,
            judge_provenance=self.provenance.id,
        )


def judge_samples(
    samples: Sequence[EvaluatedSample], constitution: Constitution | None, context: Context
) -> Judged | str:
    """The judge's verdicts on every sample against the base model's; where there can be none, why not."""
    from align.feedback.judge import judge_problems, open_judge
    from align.feedback.probes import examine_judge

    block = context.shared.get("judge")
    policies = context.settings.reported
    if constitution is None or block is None:
        return "the recipe names no constitution" if constitution is None else "the recipe names no judge"
    if BASE not in policies or len(policies) == 1:
        return "`evaluate.policies` needs base and another one for it"
    if problems := judge_problems(constitution, block):
        return problems[0]
    judge = open_judge(block, context.shared["model"], constitution, seed=context.seed)
    settle_judge(judge.engine, context.output)
    found = examine_judge(judge, context.output / "probes.journal")
    if block.kind != "rule" and not block.allow_chance and found.low <= 0.5:
        return f"judge {judge.name} is not shown to be better than chance ({found})"
    probes = Estimate(found.accuracy, found.low, found.high, found.n) if found.n else None
    made = label_provenance(context, judge.engine, block, constitution, principle="all", scored_by=found.scored_by)
    unlike = _unlike_base(samples)
    answers = judge.compare(list(unlike.values()), context.output / "verdicts.journal", "judge")
    return Judged(judge.name, probes, made, dict(zip(unlike, answers, strict=True)))


def _unlike_base(samples: Sequence[EvaluatedSample]) -> "dict[str, Question]":
    """What the judge is asked of the samples that say something else than the base model's, by their ids."""
    from align.feedback.opinions import Question

    base = {sample.prompt_id: sample.completion for sample in samples if sample.policy == BASE}
    return {
        sample.id: Question(sample.id, sample.prompt, sample.completion, base[sample.prompt_id], sample.category)
        for sample in samples
        if sample.policy != BASE and sample.completion.strip() != base[sample.prompt_id].strip()
    }


def _p_better(verdict: "Verdict") -> float | None:
    from align.feedback.judge import BOTH_BREAK, TIE

    tied = verdict.p_a is None and verdict.reason.startswith((TIE, BOTH_BREAK))
    return TIED if tied else verdict.p_a
