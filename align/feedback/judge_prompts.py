"""The prompts that `choice` judges and direct scores are built from, by language."""

from dataclasses import dataclass

from align.feedback.evidence import escape_template_tokens
from align.records import Conversation, Message

LETTERS = ("A", "B")


@dataclass(frozen=True)
class PromptTemplate:
    """The text around the parts of a prompt, in one language."""

    conversation: str
    system: str
    user: str
    assistant: str
    ask: str
    think: str
    conclude: str
    mark: str

    def format_choice(self, conversation: Conversation, question: str, both: tuple[str, str], last: str) -> str:
        """The conversation, the question and two completions; `last` then asks for the better one."""
        options = [f"({letter}) {escape_template_tokens(text)}" for letter, text in zip(LETTERS, both, strict=True)]
        return "\n\n".join([*self._turns(conversation), question, *options, last])

    def format_mark(self, conversation: Conversation, completion: str, principle: str) -> str:
        """The conversation with one completion and the principle, then the request for a mark."""
        answered = (*conversation, Message("assistant", completion))
        return "\n\n".join([*self._turns(answered), principle, self.mark])

    def _turns(self, conversation: Conversation) -> list[str]:
        names = {"system": self.system, "user": self.user, "assistant": self.assistant}
        said = [
            f"{names.get(turn.role, turn.role.capitalize())}: {escape_template_tokens(turn.content)}"
            for turn in conversation
        ]
        return [self.conversation, *said]


TEMPLATES = {
    "en": PromptTemplate(
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
    "ja": PromptTemplate(
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
