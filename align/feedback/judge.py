"""Who prefers one completion to another: a constitution, and one kind of judge that reads it.

Each principle that applies gives an opinion. Opinions are averaged by weight within a tier, and the first tier whose
average is clear decides; hard principles come before every tier. Exchanging A and B turns p into 1 - p exactly.

A judge that asks a model is examined on the constitution's probes before it labels: a small model that judges style
well may judge ethics at chance.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.constitution.constitution import Constitution
from align.constitution.principles import Principle, draw_principle
from align.engines.engine import Engine
from align.errors import InputError, JudgeAtChance
from align.feedback.evidence import Showing, usable_comparisons
from align.feedback.opinions import ByChoice, ByContrast, ByRule, Kind, Opinion, Question
from align.feedback.records import OpinionScores
from align.figures.statistics import wilson_interval
from align.records import Message
from align.settings.blocks import JudgeBlock, ModelBlock

NO_PRINCIPLE = "no principle applies"
ABSTAINED = "the judge abstained"
TIE = "tie"
BOTH_BREAK = "both break a hard principle"

LEAST_PROBES = 4
"""With fewer, even a judge that gets each right is within chance (Wilson's interval)."""

KINDS: dict[str, type[Kind]] = {"choice": ByChoice, "contrast": ByContrast, "rule": ByRule}


@dataclass(frozen=True)
class Verdict:
    """The judge's answer to a question.

    `p_a` is the probability that A is better, None where nothing was decided; `reason` then says why. `decided_by` has
    the principles that it was decided by: those of the deciding tier that gave an opinion, or the broken hard one.
    `by_principle` has each principle's own probability, `position_bias` the mean over principles of the probability
    given to the place shown first, minus one half, and `same_place` says that it is more than what the completions
    make before any clamp; `scores` is what all of it was made of.
    """

    p_a: float | None
    by_principle: dict[str, float]
    position_bias: float = 0.0
    reason: str = ""
    decided_by: tuple[str, ...] = ()
    scores: tuple[OpinionScores, ...] = field(default=(), compare=False, repr=False)
    same_place: bool = False


@dataclass(frozen=True)
class PrincipleResult:
    """How many of a principle's probes the judge got right; half of one for an undecided one."""

    right: float
    n: int


@dataclass(frozen=True)
class JudgeReport:
    """Share of probes that the judge got right, with its 95% interval (Wilson), and by principle.

    `scored_by` says whether the engine gives log-probabilities, or samples that vote; empty where none is asked.
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


class Judge:
    """A constitution applied by one kind of judge.

    Args:
        draw_seed: with a seed, one applicable principle is drawn for each question (Bai et al. 2022, section 4.1);
            None averages over all of them.
        seed: of chains of thought, and of what worked choices show.

    Raises:
        InputError: no principle has what this kind of judge needs.
    """

    def __init__(
        self,
        constitution: Constitution,
        block: JudgeBlock,
        engine: Engine | None = None,
        *,
        draw_seed: int | None = None,
        seed: int = 0,
    ) -> None:
        if problems := judge_problems(constitution, block):
            raise InputError("\n".join(problems))
        self.constitution = constitution
        self.block = block
        self.draw_seed = draw_seed
        self.engine = engine
        self.kind = _kind(block, constitution, engine, seed)
        self.name = block.kind if engine is None else f"{block.kind}:{engine.name}"
        self.principles = tuple(filter(self.kind.can_judge_by, constitution.principles))

    def compare(
        self,
        questions: Iterable[Question | tuple[Any, ...]],
        journal_path: Path | None = None,
        description: str = "judging",
    ) -> list[Verdict]:
        """A verdict for each (id, conversation, a, b, category), in order.

        What was scored is kept in `journal_path.<rank>`, as `complete_all` does; every process gets all verdicts.
        """
        asked = [Question(*question) for question in questions]
        chosen = [self._principles_for(question) for question in asked]
        each = [(question, principle) for question, some in zip(asked, chosen, strict=True) for principle in some]
        scores = iter(self.kind.ask(each, journal_path, description))
        return [
            self._verdict(question, [(principle, next(scores)) for principle in some])
            for question, some in zip(asked, chosen, strict=True)
        ]

    def verdict(self, question: Question, scores: Mapping[str, tuple[OpinionScores, ...]]) -> Verdict:
        """The verdict that follows from what the engine gave before, by the principles' ids; it is asked nothing.

        Raises:
            KeyError: a principle that counts has no scores.
        """
        asks = self.block.kind != "rule"
        scored = [(each, scores[each.id] if asks else ()) for each in self._principles_for(question)]
        return self._verdict(question, scored)

    def _principles_for(self, question: Question) -> list[Principle]:
        if self.draw_seed is None:
            return [principle for principle in self.principles if principle.applies_to(question.category)]
        drawn = draw_principle(self.principles, self.draw_seed, "judge", question.id, category=question.category)
        return [drawn] if drawn else []

    def _verdict(self, question: Question, scored: Sequence[tuple[Principle, tuple[OpinionScores, ...]]]) -> Verdict:
        opinions = [(principle, self.kind.opinion((question, principle), scores)) for principle, scores in scored]
        given = [(principle, opinion) for principle, opinion in opinions if opinion is not None]
        by_principle = {principle.id: self._probability(self.kind.lean(each.value)) for principle, each in given}
        bias = sum(opinion.position_bias for _, opinion in given) / max(len(given), 1)
        same_place = abs(sum(each.position_bias for _, each in given)) > abs(sum(each.unclamped for _, each in given))
        lean, reason, decided_by = self._decide(question, given)
        if reason == TIE and not given:
            reason = ABSTAINED if opinions else NO_PRINCIPLE
        rows = tuple(row for _, scores in scored for row in scores)
        p_a = None if lean is None else self._probability(lean)
        return Verdict(p_a, by_principle, bias, reason, decided_by, rows, same_place)

    def _decide(
        self, question: Question, given: Sequence[tuple[Principle, Opinion]]
    ) -> tuple[float | None, str, tuple[str, ...]]:
        """The lean towards A (probability minus one half), or None and why; and the ids of what decided."""
        hard = [each for each in self.constitution.principles if each.hard and each.applies_to(question.category)]
        broken = [broken_rule(hard, text) for text in (question.a, question.b)]
        if broken[0] and broken[1]:
            return None, f"{BOTH_BREAK} ({broken[0].id})", ()
        if rule := broken[0] or broken[1]:
            return (-0.5 if broken[0] else 0.5), "", (rule.id,)
        for tier in self._tiers(given):
            weight = sum(principle.weight for principle, _ in tier)
            lean = self.kind.lean(sum(principle.weight * opinion.value for principle, opinion in tier) / weight)
            if abs(lean) > self.block.min_margin:
                return lean, "", tuple(principle.id for principle, _ in tier)
        return None, TIE, ()

    def _tiers(self, given: Sequence[tuple[Principle, Opinion]]) -> list[list[tuple[Principle, Opinion]]]:
        """The opinions that decide together, those that decide first in front."""
        ranks = [self.constitution.rank(principle) for principle, _ in given]
        return [
            [opinion for opinion, its_rank in zip(given, ranks, strict=True) if its_rank == rank]
            for rank in sorted(set(ranks))
        ]

    def _probability(self, lean: float) -> float:
        most = 0.5 - self.block.clamp
        lean = max(-most, min(most, lean))
        # Written so that p(lean) = 1 - p(-lean) to the last bit.
        return 0.5 + lean if lean >= 0 else 1.0 - (0.5 - lean)


def broken_rule(principles: Iterable[Principle], text: str) -> Principle | None:
    """The first of the principles whose rule the text breaks."""
    return next((principle for principle in principles if not principle.keeps_rule(text)), None)


def judge_problems(constitution: Constitution, block: JudgeBlock) -> list[str]:
    """Why this kind of judge cannot read the constitution; empty where it can."""
    kind = KINDS[block.kind]
    if any(kind.can_judge_by(principle) for principle in constitution.principles):
        return _example_problems(constitution, block)
    return [
        f"judge.kind: '{block.kind}' needs a principle with {kind.needs}, and constitution '{constitution.id}' has "
        "none; choose another kind, or add it to the principles"
    ]


def probe_problems(constitution: Constitution, block: JudgeBlock) -> list[str]:
    """Why the probes cannot show this judge to be better than chance, even if it gets each right; empty if they can."""
    if block.kind == "rule" or block.allow_chance:
        return []
    probes = sum(len(each.probes) for each in constitution.principles if KINDS[block.kind].can_judge_by(each))
    if probes >= LEAST_PROBES:
        return []
    return [
        f"judge.kind: a judge by '{block.kind}' must be shown to be better than chance before it labels, and "
        f"constitution '{constitution.id}' has {probes} probes for that, too few; give its principles {LEAST_PROBES} "
        "or more, choose `judge.kind: rule`, or set `judge.allow_chance: true`"
    ]


def labelling_problems(constitution: Constitution, block: JudgeBlock) -> list[str]:
    """Why this judge cannot label by the constitution, as far as that is known before it is asked."""
    return judge_problems(constitution, block) or probe_problems(constitution, block)


def _example_problems(constitution: Constitution, block: JudgeBlock) -> list[str]:
    there = len(usable_comparisons(constitution, block.chain_of_thought))
    if block.examples <= there:
        return []
    reasoned = " with a `reasoning`" if block.chain_of_thought else ""
    return [
        f"judge.examples: {block.examples} are asked for, and constitution '{constitution.id}' has {there} worked "
        f"`comparisons`{reasoned}; add some, or ask for fewer"
    ]


def open_judge(
    block: JudgeBlock,
    model: ModelBlock,
    constitution: Constitution,
    *,
    draw_seed: int | None = None,
    seed: int = 0,
    engine: Engine | None = None,
) -> Judge:
    """The judge that a recipe describes, on its own engine, or on a `engine` that is open already."""
    if block.kind == "rule":
        return Judge(constitution, block, draw_seed=draw_seed, seed=seed)
    if engine is None:
        from align.engines.open import open_engine

        engine = open_engine(block.engine, model)
    return Judge(constitution, block, engine, draw_seed=draw_seed, seed=seed)


def examine_judge(judge: Judge, journal_path: Path | None = None) -> JudgeReport:
    """How well the judge tells the better from the worse of each principle's probes, by that principle alone."""
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
) -> JudgeReport:
    """The report of probes by their principles: a value above 0 is right, 0 and None are undecided."""
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
    return JudgeReport(judge.name, accuracy, low, high, n, position_bias, by_principle, scored_by)


def require_better_than_chance(judge: Judge, report: JudgeReport) -> None:
    """Stop before a judge labels that its probes don't show to be better than chance.

    A rule judge asks nobody: its probes agree with its rules, or the constitution would not have loaded.

    Raises:
        JudgeAtChance: the report's interval includes one half or lies below it, and the recipe does not allow that.
    """
    if judge.block.kind == "rule" or judge.block.allow_chance or report.low > 0.5:
        return
    finding = f"got {report}" if report.n else "has no probes to be tested on"
    raise JudgeAtChance(
        f"judge {judge.name} with constitution '{judge.constitution.id}' {finding}; that includes chance. "
        "Choose another `judge.kind`, a stronger model with `judge.engine.model`, or give the principles (more) "
        "probes; `judge.allow_chance: true` labels all the same"
    )


def _kind(block: JudgeBlock, constitution: Constitution, engine: Engine | None, seed: int) -> Kind:
    if block.kind == "rule":
        return ByRule(block.scale)
    if engine is None:
        raise ValueError(f"a judge by {block.kind} asks a model; give it a engine")
    showing = Showing(constitution, block.examples, reasoned=block.chain_of_thought, seed=seed)
    if block.kind == "contrast":
        return ByContrast(engine, showing, block.scale, block.batch_size)
    return ByChoice(engine, showing, block, constitution.language, seed)
