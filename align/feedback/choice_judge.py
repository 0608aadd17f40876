"""The `choice` judge: asks which of two completions is better, A or B, and reads the letters' probabilities."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from align.constitution.constitution import Principle
from align.constitution.principles import WorkedComparison, in_language
from align.engines.complete_all import complete_all
from align.engines.engine import Completed, Request
from align.feedback.evidence import escape_template_tokens, join_paragraphs
from align.feedback.judge_prompts import LETTERS, TEMPLATES, PromptTemplate
from align.feedback.opinions import Asked, EngineJudge, Opinion, Question, View, as_logprob, choice_request, margin_of
from align.feedback.records import OpinionScores
from align.records import Conversation, Message, as_dicts, digest
from align.run.reproducibility import derive_seed

ORDERS = ("ab", "ba")


@dataclass(frozen=True)
class ChoiceJudge(EngineJudge):
    """Value: the margin of A, averaged over both orders of the completions.

    Worked comparisons, if the settings ask for any, come first as earlier turns of the chat. With a chain of thought
    the judge first writes its reasoning and is then asked for the letter.
    """

    needs = "a `compare` or a `text`"

    @staticmethod
    def can_judge_by(principle: Principle) -> bool:
        return principle.question is not None

    def views(self, asked: Sequence[Asked], journal_path: Path | None, description: str) -> list[list[View]]:
        chats = [self._chats(*each) for each in asked]
        reasoning: dict[Conversation, Completed] = {}
        if self.settings.chain_of_thought:
            reasoning = self._reason(itertools.chain.from_iterable(chats), journal_path, description)
        return [
            [self._view(order, chat, principle, reasoning.get(chat)) for order, chat in zip(ORDERS, both, strict=True)]
            for both, (_, principle) in zip(chats, asked, strict=True)
        ]

    def opinion(self, asked: Asked, scores: Sequence[OpinionScores]) -> Opinion | None:
        a_first, b_first = map(self._margin_of_first, scores)
        if a_first is None or b_first is None:
            return None
        value = (self._clamped(a_first) - self._clamped(b_first)) / 2
        return Opinion(value, (a_first + b_first) / 2, (a_first - b_first) / 2)

    def margin(self, value: float) -> float:
        return value

    def template(self, principle: Principle) -> PromptTemplate:
        """The prompts for this principle, in its language."""
        return in_language(TEMPLATES, self.context.language_of(principle))

    def _margin_of_first(self, row: OpinionScores) -> float | None:
        """Normalised probability of the first letter minus one half; None where the letters have too little mass."""
        mass = row.option_mass or 0.0
        if mass == 0 or mass < self.settings.min_option_mass:
            return None
        return margin_of(as_logprob(row.logprobs[0]) - as_logprob(row.logprobs[1]))

    def _clamped(self, margin: float) -> float:
        """The margin, clamped after a chain of thought. This comes before any mean, which overconfident orders or
        principles would otherwise decide."""
        most = 0.5 - self.settings.chain_of_thought_range[0] if self.settings.chain_of_thought else 0.5
        return max(-most, min(most, margin))

    def _chats(self, question: Question, principle: Principle) -> list[Conversation]:
        """Worked comparisons, then the question, with the completions in each of the two orders."""
        conversation, both = question.conversation, (question.a, question.b)
        # Found for both orders together, so that both show the same passages and worked comparisons.
        passages = self.context.quoted_passages(principle, conversation, *both)
        worked = self.context.worked_comparisons(principle, conversation, both)
        turns = [turn for number, each in enumerate(worked) for turn in self._worked_turns(number, *each)]
        texts = [self._question_text(principle, conversation, options) for options in (both, both[::-1])]
        return [(*turns, Message("user", join_paragraphs(passages, text))) for text in texts]

    def _question_text(self, principle: Principle, conversation: Conversation, options: tuple[str, str]) -> str:
        template = self.template(principle)
        last = template.think if self.settings.chain_of_thought else template.ask
        return template.format_choice(conversation, principle.question or "", options, last)

    def _worked_turns(self, number: int, worked: WorkedComparison, principle: Principle) -> Conversation:
        """A worked comparison as chat turns. Without an `answer`, the better one alternates between A and B."""
        letter = worked.answer or LETTERS[number % 2]
        options = (worked.better, worked.worse) if letter == LETTERS[0] else (worked.worse, worked.better)
        chat = (Message("user", self._question_text(principle, worked.conversation, options)),)
        reasoning = worked.reasoning if self.settings.chain_of_thought else None
        return *self._up_to_letter(chat, reasoning, principle), Message("assistant", letter)

    def _up_to_letter(self, chat: Conversation, reasoning: str | None, principle: Principle) -> Conversation:
        """The chat up to the point where the letter is asked for."""
        if reasoning is None:
            return chat
        written = Message("assistant", escape_template_tokens(reasoning))
        return *chat, written, Message("user", self.template(principle).conclude)

    def _view(self, order: str, chat: Conversation, principle: Principle, reasoning: Completed | None) -> View:
        text = reasoning.text.strip() if reasoning else None
        return View(order, choice_request(self._up_to_letter(chat, text, principle), LETTERS), reasoning)

    def _reason(
        self, chats: Iterable[Conversation], journal_path: Path | None, description: str
    ) -> dict[Conversation, Completed]:
        """The judge's reasoning on each chat. Its seed follows from the chat, so equal chats share one reasoning."""
        requests = {chat: self._reasoning_request(chat) for chat in chats}
        done = complete_all(
            self.engine,
            list(requests.values()),
            self.settings.reasoning.batch_size,
            journal_path and journal_path.with_name(f"reasoning-{journal_path.name}"),
            f"{description}: reasoning",
        )
        return {chat: done[request.id] for chat, request in requests.items()}

    def _reasoning_request(self, chat: Conversation) -> Request:
        sampling = self.settings.reasoning
        drawn = (sampling.max_new_tokens, sampling.temperature, sampling.top_p)
        seed = derive_seed(self.context.seed, "reasoning", digest(as_dicts(chat)))
        return Request(digest([as_dicts(chat), "reasoning", *drawn, seed]), chat, seed, *drawn)
