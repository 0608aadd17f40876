"""The judge: decides which of two completions follows a constitution better, and how probably.

Each principle that applies gives an opinion. Opinions are averaged by weight within a tier, and the first tier whose
average is clear decides. Before any tier, a hard principle decides if one completion breaks its rule, or if its opinion
is clearer than `hard_margin`. Exchanging A and B turns p into exactly 1 - p.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.constitution.constitution import Constitution
from align.constitution.principles import Principle, draw_principle
from align.engines.engine import Engine
from align.errors import InputError
from align.feedback.choice_judge import ChoiceJudge
from align.feedback.contrast_judge import ContrastJudge
from align.feedback.evidence import PromptContext, usable_comparisons
from align.feedback.opinions import JudgeKind, Opinion, Question, RuleJudge
from align.feedback.records import Scores
from align.settings.blocks import JudgeBlock, ModelBlock

NO_PRINCIPLE = "no principle applies"
ABSTAINED = "the judge abstained"
TIE = "tie"
BOTH_BREAK = "both break a hard principle"

KINDS: dict[str, type[JudgeKind]] = {"choice": ChoiceJudge, "contrast": ContrastJudge, "rule": RuleJudge}


@dataclass(frozen=True)
class Verdict:
    """The judge's answer to a question.

    Attributes:
        p_a: the probability that A is better; None where nothing was decided.
        by_principle: each principle's own probability that A is better.
        position_bias: the mean probability, over principles, of the completion shown first, minus one half.
        reason: why nothing was decided; empty where `p_a` is given.
        decided_by: ids of the deciding principles: the deciding tier's that gave an opinion, or the broken hard one.
        scores: the engine's scores that the verdict was computed from.
        same_place: whether, before any clamp and over all principles, both orders prefer the same position.
    """

    p_a: float | None
    by_principle: dict[str, float]
    position_bias: float = 0.0
    reason: str = ""
    decided_by: tuple[str, ...] = ()
    scores: Scores = field(default=(), compare=False, repr=False)
    same_place: bool = False


class Judge:
    """Compares two completions of a conversation by the principles of a constitution.

        judge = Judge(load_constitution("constitutions/honesty.yaml"), JudgeBlock(kind="choice"), engine)
        [verdict] = judge.compare([Question("q1", conversation, a, b)])
        verdict.p_a  # the probability that `a` is better; None for a tie or an abstention

    Args:
        constitution: the principles, with their weights, tiers and hard rules.
        settings: the kind of judge, and when it calls a tie or abstains; `judge` in a recipe.
        engine: the model to ask; None for `kind: rule`, which asks none.
        draw_seed: with a seed, one applicable principle is drawn for each question (Bai et al. 2022, section 4.1).
            None averages over all applicable principles.
        seed: seeds chains of thought, and draws a principle for each worked comparison that names none.

    Raises:
        InputError: no principle has what this kind of judge needs, or the constitution has too few worked comparisons.
        ValueError: this kind of judge asks a model, and there is no engine.
    """

    def __init__(
        self,
        constitution: Constitution,
        settings: JudgeBlock,
        engine: Engine | None = None,
        *,
        draw_seed: int | None = None,
        seed: int = 0,
    ) -> None:
        if problems := judge_problems(constitution, settings):
            raise InputError("\n".join(problems))
        self.constitution = constitution
        self.settings = settings
        self.draw_seed = draw_seed
        self.engine = engine
        self.kind = _kind(settings, constitution, engine, seed)
        self.name = settings.kind if engine is None else f"{settings.kind}:{engine.name}"
        self.principles = tuple(filter(self.kind.can_judge_by, constitution.principles))

    def compare(
        self,
        questions: Iterable[Question | tuple[Any, ...]],
        journal_path: Path | None = None,
        description: str = "judging",
    ) -> list[Verdict]:
        """A verdict for each question, in order, in every process.

        Args:
            questions: `Question`s, or tuples of their fields.
            journal_path: finished scores are kept in `journal_path.<rank>`, and a call that was interrupted resumes
                from them. None keeps nothing.
            description: the text of the progress bar.
        """
        asked = [Question(*question) for question in questions]
        chosen = [self._principles_for(question) for question in asked]
        each = [(question, principle) for question, some in zip(asked, chosen, strict=True) for principle in some]
        scores = iter(self.kind.ask(each, journal_path, description))
        return [
            self._verdict(question, [(principle, next(scores)) for principle in some])
            for question, some in zip(asked, chosen, strict=True)
        ]

    def verdict(self, question: Question, scores: Mapping[str, Scores]) -> Verdict:
        """The verdict that follows from stored scores, by principle id. The engine is not asked.

        Raises:
            KeyError: a principle that counts has no scores.
        """
        asks = self.settings.kind != "rule"
        scored = [(each, scores[each.id] if asks else ()) for each in self._principles_for(question)]
        return self._verdict(question, scored)

    def _principles_for(self, question: Question) -> list[Principle]:
        return principles_for(self.principles, question.category, self.draw_seed, "judge", question.id)

    def _verdict(self, question: Question, scored: Sequence[tuple[Principle, Scores]]) -> Verdict:
        opinions = [(principle, self.kind.opinion((question, principle), scores)) for principle, scores in scored]
        given = [(principle, opinion) for principle, opinion in opinions if opinion is not None]
        by_principle = {principle.id: self._probability(self.kind.margin(each.value)) for principle, each in given}
        bias = sum(opinion.position_bias for _, opinion in given) / max(len(given), 1)
        same_place = abs(sum(each.position_bias for _, each in given)) > abs(sum(each.unclamped for _, each in given))
        margin, reason, decided_by = self._decide(question, given)
        if reason == TIE and not given:
            reason = ABSTAINED if opinions else NO_PRINCIPLE
        rows = tuple(row for _, scores in scored for row in scores)
        p_a = None if margin is None else self._probability(margin)
        return Verdict(p_a, by_principle, bias, reason, decided_by, rows, same_place)

    def _decide(
        self, question: Question, given: Sequence[tuple[Principle, Opinion]]
    ) -> tuple[float | None, str, tuple[str, ...]]:
        """A's margin (probability minus one half), or None and the reason; and the ids of the deciding principles."""
        a_breaks, b_breaks = (
            broken_hard_rule(self.constitution, question.category, text) for text in (question.a, question.b)
        )
        if a_breaks and b_breaks:
            return None, f"{BOTH_BREAK} ({a_breaks.id})", ()
        if broken := a_breaks or b_breaks:
            return (-0.5 if a_breaks else 0.5), "", (broken.id,)
        for tier in self._tiers(given):
            weight = sum(principle.weight for principle, _ in tier)
            margin = self.kind.margin(sum(principle.weight * opinion.value for principle, opinion in tier) / weight)
            if abs(margin) > self.settings.min_margin:
                return margin, "", tuple(principle.id for principle, _ in tier)
        return None, TIE, ()

    def _tiers(self, given: Sequence[tuple[Principle, Opinion]]) -> Iterator[list[tuple[Principle, Opinion]]]:
        """The opinions in the order in which they decide: the clear ones of hard principles, then tier by tier.

        An unclear opinion of a hard principle counts in its tier, unless the principle has a rule: both completions
        keep it then, or both break it, so there is nothing to weigh.
        """
        hard = [each for each in given if each[0].hard and self._is_clear(each[1])]
        if hard:
            yield hard
        others = [each for each in given if not each[0].hard or (each[0].rule is None and each not in hard)]
        for _, tier in itertools.groupby(sorted(others, key=self._tier), self._tier):
            yield list(tier)

    def _is_clear(self, opinion: Opinion) -> bool:
        """Whether an opinion lets a hard principle decide. A chain of thought's clamp would hide how clear it is."""
        margin = max(abs(self.kind.margin(opinion.value)), abs(opinion.unclamped))
        return margin > self.settings.hard_margin

    def _tier(self, opinion: tuple[Principle, Opinion]) -> int:
        return self.constitution.tier_rank(opinion[0])

    def _probability(self, margin: float) -> float:
        most = 0.5 - self.settings.clamp
        margin = max(-most, min(most, margin))
        # Written so that p(margin) = 1 - p(-margin) to the last bit.
        return 0.5 + margin if margin >= 0 else 1.0 - (0.5 - margin)


def principles_for(
    principles: Sequence[Principle], category: str, draw_seed: int | None, *names: str | int
) -> list[Principle]:
    """The principles that apply to the category: all of them, or with a seed the one drawn by `names`."""
    if draw_seed is None:
        return [principle for principle in principles if principle.applies_to(category)]
    drawn = draw_principle(principles, draw_seed, *names, category=category)
    return [drawn] if drawn else []


def broken_hard_rule(constitution: Constitution, category: str, text: str) -> Principle | None:
    """The first hard principle for the category whose rule the text breaks; None where it keeps them all."""
    hard = (each for each in constitution.principles if each.hard and each.applies_to(category))
    return next((principle for principle in hard if not principle.keeps_rule(text)), None)


def judge_problems(constitution: Constitution, settings: JudgeBlock) -> list[str]:
    """Why this kind of judge cannot use the constitution; empty where it can."""
    kind = KINDS[settings.kind]
    if any(kind.can_judge_by(principle) for principle in constitution.principles):
        return _example_problems(constitution, settings)
    return [
        f"judge.kind: '{settings.kind}' needs a principle with {kind.needs}, and constitution '{constitution.id}' has "
        "none; choose another kind, or add it to the principles"
    ]


def _example_problems(constitution: Constitution, settings: JudgeBlock) -> list[str]:
    usable = len(usable_comparisons(constitution, settings.chain_of_thought))
    if settings.examples <= usable:
        return []
    reasoned = " with a `reasoning`" if settings.chain_of_thought else ""
    return [
        f"judge.examples: set to {settings.examples}, but constitution '{constitution.id}' has {usable} worked "
        f"`comparisons`{reasoned}; add some, or lower the number"
    ]


def open_judge(
    settings: JudgeBlock,
    model: ModelBlock,
    constitution: Constitution,
    *,
    draw_seed: int | None = None,
    seed: int = 0,
    engine: Engine | None = None,
) -> Judge:
    """The judge that a recipe describes. It opens its own engine unless it needs none or `engine` is given."""
    if settings.kind == "rule":
        engine = None
    elif engine is None:
        from align.engines.open import open_engine

        engine = open_engine(settings.engine, model)
    return Judge(constitution, settings, engine, draw_seed=draw_seed, seed=seed)


def _kind(settings: JudgeBlock, constitution: Constitution, engine: Engine | None, seed: int) -> JudgeKind:
    if settings.kind == "rule":
        return RuleJudge(settings)
    if engine is None:
        raise ValueError(f"judge.kind: '{settings.kind}' asks a model; pass an engine")
    context = PromptContext(constitution, settings.examples, reasoned=settings.chain_of_thought, seed=seed)
    kind = ContrastJudge if settings.kind == "contrast" else ChoiceJudge
    return kind(settings, engine, context)
