"""What one principle makes of two completions, by each kind of judge.

An opinion's `value` is positive where A follows the principle better, and changes its sign exactly when A and B change
places: every step from scores to probability is odd, also in floating point.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

from align.constitution.principles import Principle, WorkedComparison, in_language
from align.engines.complete_all import complete_all, score_all
from align.engines.engine import ChoiceRequest, ChoiceScores, Completed, Engine, Request
from align.feedback.evidence import Showing, harmless
from align.feedback.records import OpinionScores
from align.records import Conversation, Message, as_dicts, digest
from align.run.reproducibility import derive_seed
from align.settings.blocks import JudgeBlock


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
    one half, and `unclamped` that given to A: where the former is larger, the same place is preferred in both orders.
    """

    value: float
    position_bias: float = 0.0
    unclamped: float = 0.0


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

    engine: Engine
    showing: Showing
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
        before = self.showing.before(principle, question.conversation, question.a, question.b)
        return [
            request
            for completion in (question.a, question.b)
            for request in self.requests(principle, question.conversation, completion, before)
        ]

    def requests(
        self, principle: Principle, conversation: Conversation, completion: str, before: str
    ) -> list[ChoiceRequest]:
        """What scores one completion under the principle and under its opposite, with these passages before both."""
        return [
            choice_request(with_system(after(before, text), conversation), (completion,))
            for text in (principle.text, principle.opposite or "")
        ]


@dataclass(frozen=True)
class ByChoice(Kind):
    """Value: half the difference of the leans towards the first place in the orders A, B and B, A.

    Worked choices come first as turns of the chat, where the block asks for some. With a chain of thought the judge
    writes it, and is then asked for the letter.
    """

    engine: Engine
    showing: Showing
    block: JudgeBlock
    language: str
    seed: int
    needs = "a `compare` or a `text`"

    @staticmethod
    def can_judge_by(principle: Principle) -> bool:
        return principle.question is not None

    @property
    def batch_size(self) -> int:
        return self.block.batch_size

    def ask(
        self, asked: Sequence[Asked], journal_path: Path | None, description: str
    ) -> list[tuple[OpinionScores, ...]]:
        chats = {
            (number, view): chat
            for number, each in enumerate(asked)
            for view, chat in zip(ORDERS, self._chats(each), strict=True)
        }
        thoughts = self._think(chats, journal_path, description) if self.block.chain_of_thought else {}
        requests = {}
        for (number, view), chat in chats.items():
            thought = thoughts.get((number, view))
            concluded = self._concluded(chat, thought.text.strip() if thought else None, asked[number][1])
            requests[number, view] = choice_request(concluded, LETTERS)
        scores = score_once(list(requests.values()), self, journal_path, description)
        return [
            tuple(_row(each, view, scores[requests[number, view].id], thoughts.get((number, view))) for view in ORDERS)
            for number, each in enumerate(asked)
        ]

    def opinion(self, asked: Asked, scores: Sequence[OpinionScores]) -> Opinion | None:
        a_first, b_first = (self._lean_to_first(row) for row in scores)
        if a_first is None or b_first is None:
            return None
        value = (self._kept(a_first) - self._kept(b_first)) / 2
        return Opinion(value, (a_first + b_first) / 2, (a_first - b_first) / 2)

    def _lean_to_first(self, row: OpinionScores) -> float | None:
        """Normalised probability of the first letter minus one half; None where neither letter was likely at all."""
        mass = row.option_mass or 0.0
        if mass == 0 or mass < self.block.min_option_mass:
            return None
        return half_tanh(nats(row.logprobs[0]) - nats(row.logprobs[1]))

    def lean(self, value: float) -> float:
        return value

    def _kept(self, lean: float) -> float:
        """The lean, after a chain of thought within its range: before any mean, which what is oversure would decide."""
        most = 0.5 - self.block.chain_of_thought_range[0] if self.block.chain_of_thought else 0.5
        return max(-most, min(most, lean))

    def frame(self, principle: Principle) -> "Frame":
        """The words around a choice by this principle, in its language."""
        return in_language(FRAMES, principle.language or self.language)

    def _chats(self, asked: Asked) -> list[Conversation]:
        """Worked choices, then the question with the completions in each of the two orders."""
        question, principle = asked
        both = question.a, question.b
        # Whichever comes first: the two orders are shown the same passages and choices.
        before = self.showing.before(principle, question.conversation, *both)
        worked = self.showing.comparisons(principle, question.conversation, both)
        turns = [turn for number, each in enumerate(worked) for turn in self._worked(number, *each)]
        texts = [self._question(principle, question.conversation, places) for places in (both, both[::-1])]
        return [(*turns, Message("user", after(before, text))) for text in texts]

    def _question(self, principle: Principle, conversation: Conversation, places: tuple[str, str]) -> str:
        frame = self.frame(principle)
        last = frame.think if self.block.chain_of_thought else frame.ask
        return frame.format_choice(conversation, principle.question or "", *places, last)

    def _worked(self, number: int, worked: WorkedComparison, principle: Principle) -> Conversation:
        """A choice that was made: the better completion stands where the choice says, or first in every other one."""
        letter = worked.answer or LETTERS[number % 2]
        places = (worked.better, worked.worse) if letter == LETTERS[0] else (worked.worse, worked.better)
        chat = (Message("user", self._question(principle, worked.conversation, places)),)
        thought = worked.reasoning if self.block.chain_of_thought else None
        return *self._concluded(chat, thought, principle), Message("assistant", letter)

    def _concluded(self, chat: Conversation, thought: str | None, principle: Principle) -> Conversation:
        """The chat up to where the letter is asked for."""
        if thought is None:
            return chat
        return *chat, Message("assistant", harmless(thought)), Message("user", self.frame(principle).conclude)

    def _think(
        self, chats: Mapping[tuple[int, str], Conversation], journal_path: Path | None, description: str
    ) -> dict[tuple[int, str], Completed]:
        """What the judge thinks of each chat. The draw follows from what is asked, so that asked twice it is one."""
        requests = {place: self._thinking(chat) for place, chat in chats.items()}
        different = {request.id: request for request in requests.values()}
        done = complete_all(
            self.engine,
            list(different.values()),
            self.block.reasoning.batch_size,
            journal_path and journal_path.with_name(f"reasoning-{journal_path.name}"),
            f"{description}: reasoning",
        )
        return {place: done[request.id] for place, request in requests.items()}

    def _thinking(self, chat: Conversation) -> Request:
        sampling = self.block.reasoning
        drawn = (sampling.max_new_tokens, sampling.temperature, sampling.top_p)
        seed = derive_seed(self.seed, "reasoning", digest(as_dicts(chat)))
        return Request(digest([as_dicts(chat), "reasoning", *drawn, seed]), chat, seed, *drawn)


LETTERS = ("A", "B")
ORDERS = ("ab", "ba")
CONTRAST_VIEWS = ("a", "a opposite", "b", "b opposite")


@dataclass(frozen=True)
class Frame:
    """The words around a choice, in one language."""

    conversation: str
    system: str
    user: str
    assistant: str
    ask: str
    think: str
    conclude: str
    mark: str

    def format_choice(self, conversation: Conversation, question: str, first: str, second: str, last: str) -> str:
        """The conversation, two completions, and what asks for the better one."""
        options = [f"({letter}) {harmless(text)}" for letter, text in zip(LETTERS, (first, second), strict=True)]
        return "\n\n".join([*self._turns(conversation), question, *options, last])

    def format_mark(self, conversation: Conversation, completion: str, principle: str) -> str:
        """The conversation with one completion, and what asks for its mark."""
        answered = (*conversation, Message("assistant", completion))
        return "\n\n".join([*self._turns(answered), principle, self.mark])

    def _turns(self, conversation: Conversation) -> list[str]:
        names = {"system": self.system, "user": self.user, "assistant": self.assistant}
        said = [f"{names[turn.role]}: {harmless(turn.content)}" for turn in conversation]
        return [self.conversation, *said]


FRAMES = {
    "en": Frame(
        "Here is a conversation between a user and an assistant.",
        "System",
        "User",
        "Assistant",
        "Which response is it? Answer with one letter, A or B.",
        "Which response is it? Think step by step about both before you decide.",
        "So which response is it? Answer with one letter, A or B.",
        "How well does the assistant's last response follow this? Answer with one digit, from 1 (not at all) to 9 "
        "(entirely).",
    ),
    "ja": Frame(
        "次はユーザーとアシスタントの会話です。",
        "システム",
        "ユーザー",
        "アシスタント",
        "どちらの回答ですか。AかBの一文字で答えてください。",
        "どちらの回答ですか。決める前に、両方について順を追って考えてください。",
        "では、どちらの回答ですか。AかBの一文字で答えてください。",
        "アシスタントの最後の回答はこれにどれほど従っていますか。1（全く従っていない）から9（完全に従っている）までの一つの数字で答えてください。",
    ),
}


def half_tanh(odds: float) -> float:
    """The probability of these log-odds minus one half: sigmoid(x) - 1/2 = tanh(x/2)/2, computed oddly."""
    return math.copysign(0.5 * math.tanh(abs(odds) / 2), odds)


def after(before: str, text: str) -> str:
    """The text after the passages that are shown before it, if there are any."""
    return f"{before}\n\n{text}" if before else text


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
    return score_all(kind.engine, list(different.values()), kind.batch_size, journal_path, description)


def nats(logprob: float | None) -> float:
    """A stored log-probability as a number again."""
    return -math.inf if logprob is None else logprob


def option_mass(logprobs: Iterable[float | None]) -> float:
    """Probability of the options together; options that are tokens of their own exclude one another."""
    return sum(math.exp(nats(logprob)) for logprob in logprobs)


def _row(asked: Asked, view: str, scores: ChoiceScores, thought: Completed | None = None) -> OpinionScores:
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
        reasoning=thought.text if thought else "",
        reasoning_id=thought.id if thought else "",
        reasoning_end=thought.finish_reason if thought else "",
    )
