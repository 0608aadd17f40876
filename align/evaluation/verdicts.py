"""The judge's verdicts on evaluated completions against the base model's."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from align.constitution.constitution import Constitution
from align.engines.provenance import Provenance, label_provenance, pin_judge
from align.evaluation.report import BASE, TIED, EvaluatedSample
from align.figures.statistics import Estimate
from align.run.stage import Context

if TYPE_CHECKING:
    from align.feedback.judge import Verdict
    from align.feedback.opinions import Question


@dataclass(frozen=True)
class Judged:
    """The judge, and its verdicts by sample id. There is none on a text that is the base model's, or on no answer."""

    judge: str
    probes: Estimate | None
    provenance: Provenance
    verdicts: "Mapping[str, Verdict]"
    unanswered: frozenset[str]
    """The prompts to which the base model gave no answer."""

    def annotate(self, sample: EvaluatedSample) -> EvaluatedSample:
        """The sample with its verdict: none without an answer, a tie if its text is the base model's."""
        if sample.policy == BASE or sample.prompt_id in self.unanswered or not sample.answered:
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
    """The judge's verdicts on every sample against the base model's, or the reason why there are none."""
    from align.feedback.judge import judge_problems, open_judge
    from align.feedback.probes import examine_judge

    block = context.shared.get("judge")
    policies = context.settings.reported
    if constitution is None or block is None:
        return "the recipe names no constitution" if constitution is None else "the recipe names no judge"
    if BASE not in policies or len(policies) == 1:
        return "`evaluate.policies` must name base and at least one other policy"
    if problems := judge_problems(constitution, block):
        return problems[0]
    judge = open_judge(block, context.shared["model"], constitution, seed=context.seed)
    pin_judge(judge.engine, context.output)
    found = examine_judge(judge, context.output / "probes.journal")
    if block.kind != "rule" and not block.allow_chance and found.low <= 0.5:
        return f"judge {judge.name} is not shown to be better than chance ({found})"
    probes = Estimate(found.accuracy, found.low, found.high, found.n) if found.n else None
    entry = label_provenance(context, judge.engine, block, constitution, principle="all", scored_by=found.scored_by)
    questions = _questions_against_base(samples)
    verdicts = judge.compare(list(questions.values()), context.output / "verdicts.journal", "judge")
    unanswered = frozenset(sample.prompt_id for sample in samples if sample.policy == BASE and not sample.answered)
    return Judged(judge.name, probes, entry, dict(zip(questions, verdicts, strict=True)), unanswered)


def _questions_against_base(samples: Sequence[EvaluatedSample]) -> "dict[str, Question]":
    """The judge's questions, by sample id, about the answers that differ from the base model's."""
    from align.feedback.opinions import Question

    base = {sample.prompt_id: sample.completion for sample in samples if sample.policy == BASE and sample.answered}
    return {
        sample.id: Question(sample.id, sample.prompt, sample.completion, base[sample.prompt_id], sample.category)
        for sample in samples
        if sample.policy != BASE and sample.answered and sample.prompt_id in base
        if sample.completion.strip() != base[sample.prompt_id].strip()
    }


def _p_better(verdict: "Verdict") -> float | None:
    from align.feedback.judge import BOTH_BREAK, TIE

    tied = verdict.p_a is None and verdict.reason.startswith((TIE, BOTH_BREAK))
    return TIED if tied else verdict.p_a
