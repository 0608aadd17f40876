"""What a judge asks, the opinion that one principle gives, and the base classes of the kinds of judge.

An opinion's `value` is positive where A follows the principle better. Exchanging A and B flips its sign exactly: every
step from scores to probability is an odd function, in floating point too.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

from align.constitution.principles import Principle
from align.engines.complete_all import score_all
from align.engines.engine import ChoiceRequest, ChoiceScores, Completed, Engine
from align.feedback.evidence import PromptContext
from align.feedback.records import OpinionScores, Scores
from align.records import Conversation, as_dicts, digest
from align.settings.blocks import JudgeBlock


class Question(NamedTuple):
    """Asks which of two completions of a conversation is better. `category` is the prompt's."""

    id: str
    conversation: Conversation
    a: str
    b: str
    category: str = ""


class Opinion(NamedTuple):
    """One principle's opinion on one question.

    `value` is in the kind's own unit. `position_bias` is the mean probability given to the completion shown first, and
    `unclamped` that given to A before any clamp, each minus one half. Where the former is larger in magnitude, the same
    position is preferred in both orders.
    """

    value: float
    position_bias: float = 0.0
    unclamped: float = 0.0


Asked = tuple[Question, Principle]
"""A question and the principle to judge it by."""


class View(NamedTuple):
    """One of the requests that an opinion is computed from, and the chain of thought that it contains, if any."""

    name: str
    request: ChoiceRequest
    reasoning: Completed | None = None


@dataclass(frozen=True)
class JudgeKind(ABC):
    """A way to compare two completions by one principle. `needs` names what a principle must have for it."""

    settings: JudgeBlock
    needs: ClassVar[str]

    @staticmethod
    @abstractmethod
    def can_judge_by(principle: Principle) -> bool:
        """Whether the principle has what this kind needs."""

    @abstractmethod
    def ask(self, asked: Sequence[Asked], journal_path: Path | None, description: str) -> list[Scores]:
        """The engine's scores for each question and principle; empty for a kind that asks no engine."""

    @abstractmethod
    def opinion(self, asked: Asked, scores: Sequence[OpinionScores]) -> Opinion | None:
        """The opinion that follows from the scores; None where the judge abstains."""

    def opinions(self, asked: Sequence[Asked], journal_path: Path | None, description: str) -> list[Opinion | None]:
        """An opinion for each question and principle; None where the judge abstains."""
        given = self.ask(asked, journal_path, description)
        return [self.opinion(each, scores) for each, scores in zip(asked, given, strict=True)]

    def margin(self, value: float) -> float:
        """The probability that A is better, minus one half, for a value or a mean of values. An odd function."""
        return margin_of(self.settings.scale * value)


@dataclass(frozen=True)
class RuleJudge(JudgeKind):
    """Value: 1 where only A keeps the principle's rule, -1 where only B does, else 0. Asks no engine."""

    needs = "a `rule`"

    @staticmethod
    def can_judge_by(principle: Principle) -> bool:
        return principle.rule is not None

    def ask(self, asked: Sequence[Asked], journal_path: Path | None, description: str) -> list[Scores]:
        return [()] * len(asked)

    def opinion(self, asked: Asked, scores: Sequence[OpinionScores]) -> Opinion | None:
        question, principle = asked
        return Opinion(float(principle.keeps_rule(question.a)) - float(principle.keeps_rule(question.b)))


@dataclass(frozen=True)
class EngineJudge(JudgeKind):
    """A kind that asks an engine for log-probabilities, several views of each question."""

    engine: Engine
    context: PromptContext

    @abstractmethod
    def views(self, asked: Sequence[Asked], journal_path: Path | None, description: str) -> list[list[View]]:
        """The views of each question and principle, in the order in which `opinion` reads their scores."""

    def ask(self, asked: Sequence[Asked], journal_path: Path | None, description: str) -> list[Scores]:
        views = self.views(asked, journal_path, description)
        # Two questions may share a request. Its id is a digest of its content, so it is scored once.
        unique = {view.request.id: view.request for some in views for view in some}
        batch_size = self.settings.batch_size
        scores = score_all(self.engine, list(unique.values()), batch_size, journal_path, description)
        return [
            tuple(_opinion_scores(each, view, scores[view.request.id]) for view in some)
            for each, some in zip(asked, views, strict=True)
        ]


def margin_of(log_odds: float) -> float:
    """The probability of these log-odds, minus one half: sigmoid(x) - 1/2 as tanh(x/2)/2, odd to the last bit."""
    return math.copysign(0.5 * math.tanh(abs(log_odds) / 2), log_odds)


def choice_request(messages: Conversation, choices: tuple[str, ...]) -> ChoiceRequest:
    """A request whose id is a digest of its content."""
    return ChoiceRequest(digest([as_dicts(messages), choices]), messages, choices)


def as_logprob(logprob: float | None) -> float:
    """A log-probability as it was before it was stored: None stands for minus infinity, which JSON lacks."""
    return -math.inf if logprob is None else logprob


def mean_token_logprob(scores: ChoiceScores | OpinionScores) -> float:
    """The first choice's mean token log-probability, in nats."""
    return as_logprob(scores.logprobs[0]) / max(scores.tokens[0], 1)


def option_mass(logprobs: Iterable[float | None]) -> float:
    """Total probability of the options. Each must be a single, distinct token, so that they exclude one another."""
    return sum(math.exp(as_logprob(logprob)) for logprob in logprobs)


def _opinion_scores(asked: Asked, view: View, scores: ChoiceScores) -> OpinionScores:
    question, principle = asked
    logprobs = tuple(logprob if math.isfinite(logprob) else None for logprob in scores.logprobs)
    return OpinionScores(
        id=digest([question.id, principle.id, view.name]),
        comparison_id=question.id,
        principle_id=principle.id,
        view=view.name,
        request_id=scores.id,
        logprobs=logprobs,
        tokens=scores.tokens,
        option_mass=option_mass(logprobs) if len(logprobs) > 1 else None,
        reasoning=view.reasoning.text if view.reasoning else "",
        reasoning_id=view.reasoning.id if view.reasoning else "",
        reasoning_end=view.reasoning.finish_reason if view.reasoning else "",
    )
