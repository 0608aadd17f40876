"""A policy's figures, with intervals, from what was measured on its completions. No model runs here."""

from collections.abc import Sequence

from align.constitution.constitution import Constitution
from align.evaluation.report import (
    BASE,
    TIED,
    CheckedPrinciple,
    ConstitutionUsed,
    EvaluatedSample,
    PolicyReport,
    WinRate,
    rule_outcomes,
)
from align.figures.statistics import Estimate, mean_estimate, share_estimate
from align.figures.text_metrics import text_figures


def constitution_used(constitution: Constitution) -> ConstitutionUsed:
    """The part of a constitution that a report keeps."""
    checked = tuple(
        CheckedPrinciple(id=principle.id, rule=principle.rule, applies=principle.applies)
        for principle in constitution.principles
        if principle.rule
    )
    return ConstitutionUsed(id=constitution.id, title=constitution.title, digest=constitution.digest, checked=checked)


def policy_report(
    samples: Sequence[EvaluatedSample],
    checked: Sequence[CheckedPrinciple],
    judged: bool,
    seed: int,
    resamples: int,
    kl_bound: float | None = None,
) -> PolicyReport:
    """One policy's figures over its samples. `kl_bound` bounds its KL to the reference where that is not estimated."""
    outcomes = [rule_outcomes(checked, sample) for sample in samples if sample.answered]
    by_rule = {each.id: [found[each.id] for found in outcomes if each.id in found] for each in checked}
    over_rules = [sum(found.values()) / len(found) for found in outcomes if found]

    def mean(name: str) -> Estimate | None:
        values = [value for sample in samples if (value := getattr(sample, name)) is not None]
        return mean_estimate(values, seed, resamples) if values else None

    return PolicyReport(
        rules={name: share_estimate(values, seed, resamples) for name, values in by_rule.items() if values},
        all_rules=share_estimate(over_rules, seed, resamples) if over_rules else None,
        win_rate=_win_rate(samples, seed, resamples) if judged and samples[0].policy != BASE else None,
        reward=mean("score"),
        kl_to_reference_k1=mean("kl_to_reference_k1"),
        kl_to_reference_k3=mean("kl_to_reference_k3"),
        kl_to_reference_bound=kl_bound,
        answered=sum(sample.answered for sample in samples) / len(samples),
        text=text_figures(
            [sample.completion for sample in samples],
            [sample.tokens for sample in samples],
            [sample.finish_reason for sample in samples],
        ),
    )


def _win_rate(samples: Sequence[EvaluatedSample], seed: int, resamples: int) -> WinRate:
    decided = [sample.p_better for sample in samples if sample.p_better is not None]
    results = [1.0 if p > TIED else 0.0 if p < TIED else TIED for p in decided]
    return WinRate(
        share=share_estimate(results, seed, resamples) if results else None,
        wins=results.count(1.0),
        losses=results.count(0.0),
        ties=results.count(TIED),
        abstained=len(samples) - len(decided),
    )
