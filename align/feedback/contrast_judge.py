"""The `contrast` judge: compares how much likelier a principle makes each completion than its opposite does."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from align.constitution.constitution import Principle
from align.engines.engine import ChoiceRequest
from align.feedback.evidence import join_paragraphs
from align.feedback.opinions import Asked, EngineJudge, Opinion, Question, View, choice_request, mean_token_logprob
from align.feedback.records import OpinionScores
from align.records import Conversation, Message

VIEWS = ("a", "a opposite", "b", "b opposite")


@dataclass(frozen=True)
class ContrastJudge(EngineJudge):
    """Value: the contrast of A minus the contrast of B, in nats per token.

    A completion's contrast is its mean token log-probability with the principle in the system message, minus the same
    with the principle's opposite there.
    """

    needs = "a `text` and an `opposite`"

    @staticmethod
    def can_judge_by(principle: Principle) -> bool:
        return bool(principle.text and principle.opposite)

    def views(self, asked: Sequence[Asked], journal_path: Path | None, description: str) -> list[list[View]]:
        return [list(map(View, VIEWS, self._requests(*each))) for each in asked]

    def opinion(self, asked: Asked, scores: Sequence[OpinionScores]) -> Opinion | None:
        a, a_opposite, b, b_opposite = map(mean_token_logprob, scores)
        value = (a - a_opposite) - (b - b_opposite)
        return Opinion(value) if math.isfinite(value) else None

    def _requests(self, question: Question, principle: Principle) -> list[ChoiceRequest]:
        passages = self.context.quoted_passages(principle, question.conversation, question.a, question.b)
        return [
            request
            for completion in (question.a, question.b)
            for request in self.requests(principle, question.conversation, completion, passages)
        ]

    def requests(
        self, principle: Principle, conversation: Conversation, completion: str, passages: str
    ) -> list[ChoiceRequest]:
        """Score one completion under the principle and under its opposite, with the same passages before both."""
        return [
            choice_request(with_system(join_paragraphs(passages, text), conversation), (completion,))
            for text in (principle.text, principle.opposite or "")
        ]


def with_system(text: str, conversation: Conversation) -> Conversation:
    """The conversation with `text` at the start of its system message."""
    if conversation and conversation[0].role == "system":
        return Message("system", f"{text}\n\n{conversation[0].content}"), *conversation[1:]
    return Message("system", text), *conversation
