"""Tests a judge on the constitution's probes before it labels: a small model that judges style well may judge ethics
no better than chance."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.constitution.constitution import Constitution, Principle
from align.errors import JudgeAtChance
from align.feedback.judge import KINDS, Judge, judge_problems
from align.feedback.opinions import Question
from align.figures.statistics import wilson_interval
from align.records import Message
from align.settings.blocks import JudgeBlock

LEAST_PROBES = 4
"""With fewer, the Wilson interval includes one half even if the judge gets every probe right."""


@dataclass(frozen=True)
class PrincipleResult:
    """How many of a principle's `n` probes the judge got right. An undecided probe counts as half."""

    right: float
    n: int


@dataclass(frozen=True)
class ProbeReport:
    """The share of probes that the judge got right, with its 95% interval (Wilson), and the results by principle.

    `scored_by` says whether the engine gives log-probabilities or counts the votes of samples; empty without an engine.
    """

    judge: str
    accuracy: float
    low: float
    high: float
    n: int
    position_bias: float
    by_principle: dict[str, PrincipleResult]
    scored_by: str = ""

    def as_figures(self) -> dict[str, Any]:
        """The report for a manifest."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        worst = sorted(self.by_principle, key=lambda name: self.by_principle[name].right / self.by_principle[name].n)
        shown = ", ".join(f"{name} {self.by_principle[name].right:g}/{self.by_principle[name].n}" for name in worst[:5])
        return f"{self.accuracy:.0%} of {self.n} probes right, 95% interval {self.low:.0%} to {self.high:.0%}" + (
            f" (lowest: {shown})" if shown else ""
        )


def examine_judge(judge: Judge, journal_path: Path | None = None) -> ProbeReport:
    """How often the judge prefers the better completion of a principle's probes, by that principle alone."""
    asked = [
        (Question(f"{principle.id}/{number}", (Message("user", probe.prompt),), probe.better, probe.worse), principle)
        for principle in judge.principles
        for number, probe in enumerate(principle.probes)
    ]
    opinions = judge.kind.opinions(asked, journal_path, "probes")
    values = [opinion.value if opinion else None for opinion in opinions]
    given = [opinion for opinion in opinions if opinion]
    bias = sum(opinion.position_bias for opinion in given) / max(len(given), 1)
    return probe_report(judge, [principle for _, principle in asked], values, bias)


def probe_report(
    judge: Judge, asked_by: Sequence[Principle], values: Sequence[float | None], position_bias: float = 0.0
) -> ProbeReport:
    """The report on probes.

    Args:
        asked_by: the principle of each probe.
        values: for each probe, above 0 if the judge was right, below 0 if wrong, 0 or None if undecided.
    """
    right = [0.5 if not value else float(value > 0) for value in values]
    by_principle = {}
    for principle in judge.principles:
        own = [each for each, asker in zip(right, asked_by, strict=True) if asker is principle]
        if own:
            by_principle[principle.id] = PrincipleResult(sum(own), len(own))
    n = len(right)
    low, high = wilson_interval(sum(right), n)
    accuracy = sum(right) / n if n else 0.5
    scored_by = judge.engine.choice_method if judge.engine else ""
    return ProbeReport(judge.name, accuracy, low, high, n, position_bias, by_principle, scored_by)


def require_better_than_chance(judge: Judge, report: ProbeReport) -> None:
    """Stop a judge that its probes do not show to be better than chance before it labels.

    A rule judge always passes: a constitution whose probes contradict its rules does not load.

    Raises:
        JudgeAtChance: the report's interval includes one half or lies below it, and the recipe does not allow that.
    """
    if judge.settings.kind == "rule" or judge.settings.allow_chance or report.low > 0.5:
        return
    level = "worse than chance" if report.high < 0.5 else "not shown to be better than chance"
    finding = f"got {report}, {level}" if report.n else "has no probes to be tested on"
    raise JudgeAtChance(
        f"judge {judge.name} with constitution '{judge.constitution.id}' {finding}. Choose another `judge.kind`, or a "
        "stronger model with `judge.engine.model`, or give the principles (more) probes; set `judge.allow_chance: "
        "true` to label anyway"
    )


def probe_problems(constitution: Constitution, settings: JudgeBlock) -> list[str]:
    """Why probes cannot show this judge to be better than chance, even if it gets each right; empty if they can."""
    if settings.kind == "rule" or settings.allow_chance:
        return []
    probes = sum(len(each.probes) for each in constitution.principles if KINDS[settings.kind].can_judge_by(each))
    if probes >= LEAST_PROBES:
        return []
    return [
        f"judge.kind: a '{settings.kind}' judge must be shown to be better than chance before it labels, and "
        f"constitution '{constitution.id}' has too few probes for that ({probes}); give its principles {LEAST_PROBES} "
        "or more, choose `judge.kind: rule`, or set `judge.allow_chance: true`"
    ]


def labelling_problems(constitution: Constitution, settings: JudgeBlock) -> list[str]:
    """Why this judge cannot label by the constitution, as far as this is known before it is asked anything."""
    return judge_problems(constitution, settings) or probe_problems(constitution, settings)
