"""What one principle makes of two completions, by each kind of judge.

An opinion's `value` is positive where A follows the principle better, and changes its sign exactly when A and B change
places: every step from scores to probability is odd, also in floating point.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

from align.backends.complete_all import score_all
from align.constitution import Principle
from align.feedback.evidence import Showing
from align.generation import Backend, ChoiceRequest, ChoiceScores
from align.principles import WorkedComparison, in_language
from align.records import Conversation, Message, as_dicts, digest

MIN_OPTION_MASS = 0.01
"""Share of the next token's probability that the two letters must have together, for a choice to mean anything."""


class Question(NamedTuple):
    """Two completions of a conversation, of which the better one is asked for."""

    id: str
    conversation: Conversation
    a: str
    b: str
    category: str = ""


class Opinion(NamedTuple):
    """One principle's view of one question.

    `value` is in the kind's own unit; `position_bias` is the mean probability given to the place shown first, minus
    one half.
    """

    value: float
    position_bias: float = 0.0


Asked = tuple[Question, Principle]


class Kind(ABC):
    """A way of judging. `needs` says in words what a principle must have for it."""

    needs: ClassVar[str]

    @staticmethod
    @abstractmethod
    def can_judge_by(principle: Principle) -> bool:
        """Whether the principle has what this kind needs."""

    @abstractmethod
    def opinions(self, asked: Sequence[Asked], journal_path: Path | None, description: str) -> list[Opinion | None]:
        """An opinion for each question and principle; None where the judge abstains."""

    @abstractmethod
    def lean(self, value: float) -> float:
        """Probability that A is better minus one half, for a value or a mean of values; odd."""


@dataclass(frozen=True)
class ByRule(Kind):
    """Value: 1 where only A keeps the principle's rule, -1 where only B does, else 0."""

    scale: float
    needs = "a `rule`"

    @staticmethod
    def can_judge_by(principle: Principle) -> bool:
        return principle.rule is not None

    def opinions(self, asked: Sequence[Asked], journal_path: Path | None, description: str) -> list[Opinion | None]:
        return [
            Opinion(float(principle.keeps_rule(question.a)) - float(principle.keeps_rule(question.b)))
            for question, principle in asked
        ]

    def lean(self, value: float) -> float:
        return half_tanh(self.scale * value)


@dataclass(frozen=True)
class ByContrast(Kind):
    """Value: contrast of A minus contrast of B, in nats a token.

    A completion's contrast is its mean token log-probability with the principle as system text, minus the same with
    the principle's opposite.
    """

    backend: Backend
    showing: Showing
    scale: float
    batch_size: int
    needs = "a `text` and an `opposite`"

    @staticmethod
    def can_judge_by(principle: Principle) -> bool:
        return bool(principle.text and principle.opposite)

    def opinions(self, asked: Sequence[Asked], journal_path: Path | None, description: str) -> list[Opinion | None]:
        requests = [self._requests(question, principle) for question, principle in asked]
        scores = score_once([each for four in requests for each in four], self, journal_path, description)
        means = {row_id: row.logprobs[0] / max(row.tokens[0], 1) for row_id, row in scores.items()}
        values = [
            (means[a.id] - means[a_opposite.id]) - (means[b.id] - means[b_opposite.id])
            for a, a_opposite, b, b_opposite in requests
        ]
        return [Opinion(value) if math.isfinite(value) else None for value in values]

    def lean(self, value: float) -> float:
        return half_tanh(self.scale * value)

    def _requests(self, question: Question, principle: Principle) -> list[ChoiceRequest]:
        before = self.showing.before(principle, question.conversation, question.a, question.b)
        ends = (principle.text, principle.opposite or "")
        texts = [f"{before}\n\n{end}" if before else end for end in ends]
        return [
            choice_request(with_system(text, question.conversation), (completion,))
            for completion in (question.a, question.b)
            for text in texts
        ]


@dataclass(frozen=True)
class ByChoice(Kind):
    """Value: half the difference of the leans towards the first place in the orders A, B and B, A."""

    backend: Backend
    showing: Showing
    batch_size: int
    language: str
    needs = "a `compare` or a `text`"

    @staticmethod
    def can_judge_by(principle: Principle) -> bool:
        return principle.question is not None

    def opinions(self, asked: Sequence[Asked], journal_path: Path | None, description: str) -> list[Opinion | None]:
        requests = [
            (
                self._request(question, principle, question.a, question.b),
                self._request(question, principle, question.b, question.a),
            )
            for question, principle in asked
        ]
        scores = score_once([each for both in requests for each in both], self, journal_path, description)
        return [_both_orders(scores[a_first.id], scores[b_first.id]) for a_first, b_first in requests]

    def lean(self, value: float) -> float:
        return value

    def _request(self, question: Question, principle: Principle, first: str, second: str) -> ChoiceRequest:
        text = self._frame(principle).format_choice(question.conversation, principle.question or "", first, second)
        # Both completions, whichever comes first: the two orders are shown the same passages and choices.
        before = self.showing.before(principle, question.conversation, question.a, question.b)
        worked = self.showing.comparisons(principle, question.conversation, (question.a, question.b))
        turns = [turn for number, each in enumerate(worked) for turn in self._worked(number, *each)]
        return choice_request((*turns, Message("user", f"{before}\n\n{text}" if before else text)), LETTERS)

    def _worked(self, number: int, worked: WorkedComparison, principle: Principle) -> Conversation:
        """A choice that was made: the better completion stands first in every other one."""
        right = number % 2
        options = (worked.worse, worked.better) if right else (worked.better, worked.worse)
        text = self._frame(principle).format_choice(worked.conversation, principle.question or "", *options)
        return Message("user", text), Message("assistant", LETTERS[right])

    def _frame(self, principle: Principle) -> "Frame":
        return in_language(FRAMES, principle.language or self.language)


LETTERS = ("A", "B")


@dataclass(frozen=True)
class Frame:
    """The words around a choice, in one language."""

    conversation: str
    user: str
    assistant: str
    ask: str

    def format_choice(self, conversation: Conversation, question: str, first: str, second: str) -> str:
        names = {"user": self.user, "assistant": self.assistant}
        turns = [f"{names[turn.role]}: {turn.content}" for turn in conversation if turn.role in names]
        options = [f"({letter}) {text}" for letter, text in zip(LETTERS, (first, second), strict=True)]
        return "\n\n".join([self.conversation, *turns, question, *options, self.ask])


FRAMES = {
    "en": Frame(
        "Here is a conversation between a user and an assistant.",
        "User",
        "Assistant",
        "Which response is it? Answer with one letter, A or B.",
    ),
    "ja": Frame(
        "次はユーザーとアシスタントの会話です。",
        "ユーザー",
        "アシスタント",
        "どちらの回答ですか。AかBの一文字で答えてください。",
    ),
}


def half_tanh(odds: float) -> float:
    """The probability of these log-odds minus one half: sigmoid(x) - 1/2 = tanh(x/2)/2, computed oddly."""
    return math.copysign(0.5 * math.tanh(abs(odds) / 2), odds)


def with_system(text: str, conversation: Conversation) -> Conversation:
    """The conversation with `text` at the start of its system message."""
    if conversation and conversation[0].role == "system":
        return Message("system", f"{text}\n\n{conversation[0].content}"), *conversation[1:]
    return Message("system", text), *conversation


def choice_request(messages: Conversation, choices: tuple[str, ...]) -> ChoiceRequest:
    """A request whose id follows from its content: the same question asked twice is scored once."""
    return ChoiceRequest(digest([as_dicts(messages), choices]), messages, choices)


def score_once(
    requests: Sequence[ChoiceRequest], kind: "ByContrast | ByChoice", journal_path: Path | None, description: str
) -> dict[str, ChoiceScores]:
    different = {request.id: request for request in requests}
    return score_all(kind.backend, list(different.values()), kind.batch_size, journal_path, description)


def _both_orders(a_first: ChoiceScores, b_first: ChoiceScores) -> Opinion | None:
    leans = [_lean_to_first(scores) for scores in (a_first, b_first)]
    if leans[0] is None or leans[1] is None:
        return None
    return Opinion((leans[0] - leans[1]) / 2, (leans[0] + leans[1]) / 2)


def _lean_to_first(scores: ChoiceScores) -> float | None:
    """Normalised probability of the first letter minus one half; None where neither letter was likely at all."""
    first, second = scores.logprobs
    if math.exp(first) + math.exp(second) < MIN_OPTION_MASS:
        return None
    return half_tanh(first - second)
