"""Compares two evaluated runs on the prompts and policies they share; most often they differ in constitution.

Differences are paired by prompt. Figures that come from a run's own judge or reward model are shown for each run but
not subtracted: the scores of two reward models are not comparable.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from align.errors import InputError
from align.evaluation.report import (
    BASE,
    CheckedPrinciple,
    EvaluatedSample,
    PolicyReport,
    Report,
    read_report,
    read_samples,
    rule_outcomes,
)
from align.figures.statistics import Estimate, mean_estimate, paired_difference, paired_share_difference, share_estimate
from align.run.artefacts import require_run
from align.run.reproducibility import derive_seed

EVALUATE = "evaluate"
Measure = Callable[[EvaluatedSample], float | None]
Rows = Sequence[tuple[EvaluatedSample, ...]]


@dataclass(frozen=True)
class Run:
    """An evaluated run: its report, and its completions by policy and prompt id."""

    directory: Path
    report: Report
    completions: Mapping[str, Mapping[str, EvaluatedSample]]

    @property
    def checked(self) -> tuple[CheckedPrinciple, ...]:
        """The constitution's principles that a program can check."""
        return self.report.constitution.checked if self.report.constitution else ()

    @property
    def constitution_key(self) -> str:
        used = self.report.constitution
        return f"{used.id}-{used.digest[:8]}" if used else "no constitution"


@dataclass(frozen=True)
class ComparedFigure:
    """A figure of one policy in both runs. `difference` is B - A over shared prompts; None if the scales differ."""

    policy: str
    figure: str
    is_share: bool
    a: Estimate | None
    b: Estimate | None
    difference: Estimate | None


@dataclass(frozen=True)
class CrossedRules:
    """One policy of each run under the rules of each constitution: the mean share of rules that a completion follows.

    `cells[i][j]` is the policy of run i (A, B) under the rules of constitution j. `gains`, paired by prompt, say by how
    much A's policy follows A's rules more than B's policy does, and B's policy follows B's rules more than A's does.
    """

    policy: str
    cells: tuple[tuple[Estimate, Estimate], tuple[Estimate, Estimate]]
    gains: tuple[Estimate, Estimate]

    @property
    def diagonal_wins(self) -> bool:
        """Whether each run's policy follows its own rules better, by an interval wholly above zero."""
        return all(gain.low > 0 for gain in self.gains)


@dataclass(frozen=True)
class AgainstNull:
    """How far a rule's share moved from A to B, and from A to C, a null run that should not differ from A."""

    policy: str
    principle: str
    a: Estimate
    to_b: Estimate
    to_c: Estimate

    @property
    def beyond_null(self) -> bool:
        """Whether the interval of B - A stays further from zero than the interval of C - A ever reaches."""
        nearest = max(self.to_b.low, -self.to_b.high, 0.0)
        return nearest > max(abs(self.to_c.low), abs(self.to_c.high))


def load_run(directory: Path) -> Run:
    """Read an evaluated run, given its folder or its `evaluate` folder.

    Raises:
        InputError: it has not been evaluated, or was evaluated by an incompatible version.
    """
    require_run(directory, EVALUATE)
    evaluated = directory / EVALUATE if (directory / EVALUATE).is_dir() else directory
    report = read_report(evaluated)
    completions: dict[str, dict[str, EvaluatedSample]] = {}
    for sample in read_samples(evaluated):
        completions.setdefault(sample.policy, {})[sample.prompt_id] = sample
    return Run(directory, report, completions)


def paired(policy: str, *runs: Run) -> Rows:
    """The runs' completions of the prompts that they all have, in the first run's order."""
    first = runs[0].completions[policy]
    common = [prompt for prompt in first if all(prompt in run.completions[policy] for run in runs)]
    return [tuple(run.completions[policy][prompt] for run in runs) for prompt in common]


def shared_policies(*runs: Run) -> list[str]:
    """The policies of which every run has a completion of at least one common prompt.

    Raises:
        InputError: there are none.
    """
    present = [name for name in runs[0].completions if all(name in run.completions for run in runs)]
    policies = [name for name in present if paired(name, *runs)]
    if not policies:
        folders = " and ".join(str(run.directory) for run in runs)
        raise InputError(
            f"{folders}: no policy and prompt in common; compare runs whose recipes share prompts and policies"
        )
    return policies


def differing_settings(a: Run, b: Run) -> list[str]:
    """What differs between the runs besides the constitution, and may therefore explain a difference."""
    first, second = a.report, b.report
    pairs: dict[str, tuple[object, object]] = {
        "base model": (first.base_model, second.base_model),
        "seed": (first.seed, second.seed),
        "held-out prompts": (_prompt_ids(a), _prompt_ids(b)),
    }
    pairs |= {f"evaluate.{key}": (value, second.settings.get(key)) for key, value in first.settings.items()}
    return [name for name, (one, other) in pairs.items() if one != other]


def compared_figures(a: Run, b: Run) -> list[ComparedFigure]:
    """Every figure of the policies that both runs have."""
    return [figure for policy in shared_policies(a, b) for figure in _figures(policy, a, b)]


def crossed_rules(a: Run, b: Run) -> list[CrossedRules]:
    """The trained policies of both runs under the rules of both constitutions; empty if either has no rules."""
    if not a.checked or not b.checked:
        return []
    crossed = (_crossed(policy, a, b) for policy in shared_policies(a, b) if policy != BASE)
    return [each for each in crossed if each is not None]


def against_null(a: Run, b: Run, c: Run) -> list[AgainstNull]:
    """For each trained policy and each rule of A and of B, the difference to B and to the null run C."""
    found = []
    seed = _seed(a)
    for policy in shared_policies(a, b, c):
        rows = paired(policy, a, b, c) if policy != BASE else []
        for label, measure in _rule_measures(a, b):
            one, two, three = _values(rows, measure, runs=3)
            if one:
                to_b, to_c = (paired_share_difference(other, one, seed) for other in (two, three))
                found.append(AgainstNull(policy, label, share_estimate(one, seed), to_b, to_c))
    return found


def _figures(policy: str, a: Run, b: Run) -> Iterator[ComparedFigure]:
    rows = paired(policy, a, b)
    for label, measure in _rule_measures(a, b):
        yield from _measured(policy, label, rows, measure, _seed(a), is_share=True)
    yield from _measured(policy, "length (tokens)", rows, lambda sample: float(sample.tokens), _seed(a))
    yield from _measured(policy, "KL to reference (nats)", rows, lambda sample: sample.kl_to_reference_k1, _seed(a))
    one, other = a.report.policies[policy], b.report.policies[policy]
    own_scale = (
        ComparedFigure(policy, "win rate vs base", True, _win_rate(one), _win_rate(other), None),
        ComparedFigure(policy, "reward", False, one.reward, other.reward, None),
    )
    yield from (figure for figure in own_scale if figure.a or figure.b)


def _measured(
    policy: str, figure: str, rows: Rows, measure: Measure, seed: int, is_share: bool = False
) -> Iterator[ComparedFigure]:
    """The figure, if both runs measured it on a common prompt."""
    one, two = _values(rows, measure)
    if one:
        estimate = share_estimate if is_share else mean_estimate
        difference = paired_share_difference if is_share else paired_difference
        yield ComparedFigure(
            policy, figure, is_share, estimate(one, seed), estimate(two, seed), difference(two, one, seed)
        )


def _win_rate(policy: PolicyReport) -> Estimate | None:
    return policy.win_rate.share if policy.win_rate else None


def _crossed(policy: str, a: Run, b: Run) -> CrossedRules | None:
    rows, seed = paired(policy, a, b), _seed(a)
    columns = [_values(rows, _mean_share(run.checked)) for run in (a, b)]
    if not all(one for one, _ in columns):
        return None
    (a_under_a, b_under_a), (a_under_b, b_under_b) = columns
    return CrossedRules(
        policy,
        (
            (share_estimate(a_under_a, seed), share_estimate(a_under_b, seed)),
            (share_estimate(b_under_a, seed), share_estimate(b_under_b, seed)),
        ),
        (
            paired_share_difference(a_under_a, b_under_a, seed),
            paired_share_difference(b_under_b, a_under_b, seed),
        ),
    )


def _rule_measures(a: Run, b: Run) -> list[tuple[str, Measure]]:
    """A label and a measure for each rule of A, and for each rule of B that A does not have."""
    measures: dict[tuple[str, tuple[str, ...]], tuple[str, Measure]] = {}
    for name, run in (("A", a), ("B", b)):
        for principle in run.checked:
            label = f"{name}'s {principle.id} ({principle.rule})"
            measures.setdefault((str(principle.rule), principle.applies), (label, _outcome(principle)))
    return list(measures.values())


def _outcome(principle: CheckedPrinciple) -> Measure:
    return lambda sample: rule_outcomes([principle], sample).get(principle.id)


def _mean_share(checked: Sequence[CheckedPrinciple]) -> Measure:
    def measure(sample: EvaluatedSample) -> float | None:
        outcomes = rule_outcomes(checked, sample)
        return sum(outcomes.values()) / len(outcomes) if outcomes else None

    return measure


def _values(rows: Rows, measure: Measure, runs: int = 2) -> list[list[float]]:
    """Each run's values, on the rows where every run has one."""
    measured = [[measure(sample) for sample in row] for row in rows]
    whole = [[value for value in row if value is not None] for row in measured if None not in row]
    return [list(values) for values in zip(*whole, strict=True)] or [[]] * runs


def _prompt_ids(run: Run) -> set[str]:
    return {prompt for completions in run.completions.values() for prompt in completions}


def _seed(run: Run) -> int:
    return derive_seed(run.report.seed, "compare-runs")
