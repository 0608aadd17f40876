"""What one principle makes of two completions, by each kind of judge.

An opinion's `value` is positive where A follows the principle better, and changes its sign exactly when A and B change
places: every step from scores to probability is odd, also in floating point.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

from align.backends.complete_all import score_all
from align.constitution import Principle
from align.generation import Backend, ChoiceRequest, ChoiceScores
from align.records import Conversation, Message, OpinionScores, as_dicts, digest


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
    def ask(
        self, asked: Sequence[Asked], journal_path: Path | None, description: str
    ) -> list[tuple[OpinionScores, ...]]:
        """What the engine gives for each question and principle; nothing where no engine is asked."""

    @abstractmethod
    def opinion(self, asked: Asked, scores: Sequence[OpinionScores]) -> Opinion | None:
        """What follows from the scores; None where the judge abstains."""

    def opinions(self, asked: Sequence[Asked], journal_path: Path | None, description: str) -> list[Opinion | None]:
        """An opinion for each question and principle; None where the judge abstains."""
        given = self.ask(asked, journal_path, description)
        return [self.opinion(each, scores) for each, scores in zip(asked, given, strict=True)]

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

    def ask(
        self, asked: Sequence[Asked], journal_path: Path | None, description: str
    ) -> list[tuple[OpinionScores, ...]]:
        return [()] * len(asked)

    def opinion(self, asked: Asked, scores: Sequence[OpinionScores]) -> Opinion | None:
        question, principle = asked
        return Opinion(float(principle.keeps_rule(question.a)) - float(principle.keeps_rule(question.b)))

    def lean(self, value: float) -> float:
        return half_tanh(self.scale * value)


@dataclass(frozen=True)
class ByContrast(Kind):
    """Value: contrast of A minus contrast of B, in nats a token.

    A completion's contrast is its mean token log-probability with the principle as system text, minus the same with
    the principle's opposite.
    """

    backend: Backend
    scale: float
    batch_size: int
    needs = "a `text` and an `opposite`"

    @staticmethod
    def can_judge_by(principle: Principle) -> bool:
        return bool(principle.text and principle.opposite)

    def ask(
        self, asked: Sequence[Asked], journal_path: Path | None, description: str
    ) -> list[tuple[OpinionScores, ...]]:
        requests = [self._requests(question, principle) for question, principle in asked]
        scores = score_once([each for four in requests for each in four], self, journal_path, description)
        return [
            tuple(_row(each, view, scores[request.id]) for view, request in zip(CONTRAST_VIEWS, four, strict=True))
            for each, four in zip(asked, requests, strict=True)
        ]

    def opinion(self, asked: Asked, scores: Sequence[OpinionScores]) -> Opinion | None:
        a, a_opposite, b, b_opposite = (nats(row.logprobs[0]) / max(row.tokens[0], 1) for row in scores)
        value = (a - a_opposite) - (b - b_opposite)
        return Opinion(value) if math.isfinite(value) else None

    def lean(self, value: float) -> float:
        return half_tanh(self.scale * value)

    def _requests(self, question: Question, principle: Principle) -> list[ChoiceRequest]:
        texts = (principle.text, principle.opposite or "")
        return [
            choice_request(with_system(text, question.conversation), (completion,))
            for completion in (question.a, question.b)
            for text in texts
        ]


@dataclass(frozen=True)
class ByChoice(Kind):
    """Value: half the difference of the leans towards the first place in the orders A, B and B, A."""

    backend: Backend
    batch_size: int
    language: str
    min_option_mass: float
    needs = "a `compare` or a `text`"

    @staticmethod
    def can_judge_by(principle: Principle) -> bool:
        return principle.question is not None

    def ask(
        self, asked: Sequence[Asked], journal_path: Path | None, description: str
    ) -> list[tuple[OpinionScores, ...]]:
        requests = [
            (
                self._request(question, principle, question.a, question.b),
                self._request(question, principle, question.b, question.a),
            )
            for question, principle in asked
        ]
        scores = score_once([each for both in requests for each in both], self, journal_path, description)
        return [
            tuple(_row(each, view, scores[request.id]) for view, request in zip(ORDERS, both, strict=True))
            for each, both in zip(asked, requests, strict=True)
        ]

    def opinion(self, asked: Asked, scores: Sequence[OpinionScores]) -> Opinion | None:
        a_first, b_first = (self._lean_to_first(row) for row in scores)
        if a_first is None or b_first is None:
            return None
        return Opinion((a_first - b_first) / 2, (a_first + b_first) / 2)

    def _lean_to_first(self, row: OpinionScores) -> float | None:
        """Normalised probability of the first letter minus one half; None where neither letter was likely at all."""
        mass = row.option_mass or 0.0
        if mass == 0 or mass < self.min_option_mass:
            return None
        return half_tanh(nats(row.logprobs[0]) - nats(row.logprobs[1]))

    def lean(self, value: float) -> float:
        return value

    def _request(self, question: Question, principle: Principle, first: str, second: str) -> ChoiceRequest:
        frame = FRAMES.get(self.language, FRAMES["en"])
        text = frame.format_choice(question.conversation, principle.question or "", first, second)
        return choice_request((Message("user", text),), LETTERS)


LETTERS = ("A", "B")
ORDERS = ("ab", "ba")
CONTRAST_VIEWS = ("a", "a opposite", "b", "b opposite")


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


def nats(logprob: float | None) -> float:
    """A stored log-probability as a number again."""
    return -math.inf if logprob is None else logprob


def option_mass(logprobs: Iterable[float | None]) -> float:
    """Probability of the options together; options that are tokens of their own exclude one another."""
    return sum(math.exp(nats(logprob)) for logprob in logprobs)


def _row(asked: Asked, view: str, scores: ChoiceScores) -> OpinionScores:
    question, principle = asked
    logprobs = tuple(logprob if math.isfinite(logprob) else None for logprob in scores.logprobs)
    return OpinionScores(
        id=digest([question.id, principle.id, view]),
        comparison_id=question.id,
        principle_id=principle.id,
        view=view,
        request_id=scores.id,
        logprobs=logprobs,
        tokens=scores.tokens,
        option_mass=option_mass(logprobs) if view in ORDERS else None,
    )
