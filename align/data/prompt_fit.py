"""Whether a model can read a prompt: its chat template renders it, and it leaves room for the answer."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from align.data.chat import prompt_ids, prompt_text, token_ids
from align.data.prompts import TOO_LONG
from align.errors import InputError
from align.records import Conversation

TRIES = 8


def require_whole(tokenizer: Any, conversation: Conversation, system_prompt: str | None = None) -> None:
    """Check that the template leaves out no system or tool message; some do so without an error.

    Raises:
        InputError: it leaves one out, or refuses the conversation.
    """
    unusual = [message for message in conversation if message.role not in ("user", "assistant")]
    if not unusual:
        return
    text = prompt_text(tokenizer, conversation, system_prompt)
    if lost := [message for message in unusual if message.content.strip() not in text]:
        raise InputError(
            f"chat template: leaves out the message of role {lost[0].role}; use a model whose template renders it, "
            "or remove it from the row"
        )


@dataclass(frozen=True)
class PromptFit:
    """What becomes of a prompt of a model with this tokenizer.

    Called with a conversation it returns the conversation, cut if it is too long and `cut` names a side, or else the
    reason to leave it out.
    """

    tokenizer: Any
    system_prompt: str | None = None
    max_tokens: int | None = None
    cut: Literal["start", "end"] | None = None

    def __call__(self, conversation: Conversation) -> Conversation | str:
        """
        Raises:
            InputError: the template refuses the conversation, or leaves out a message.
        """
        require_whole(self.tokenizer, conversation, self.system_prompt)
        if self._excess(conversation) <= 0:
            return conversation
        if self.cut is None:
            return TOO_LONG
        if self.cut == "start":
            conversation = self._without_first_turns(conversation)
        return self._cut_text(conversation)

    def _excess(self, conversation: Conversation) -> int:
        """By how many tokens the prompt is too long."""
        ids = prompt_ids(self.tokenizer, conversation, self.system_prompt)
        return 0 if self.max_tokens is None else len(ids) - self.max_tokens

    def _without_first_turns(self, conversation: Conversation) -> Conversation:
        """The conversation from a later user's turn on, the first with which it fits or else the last."""
        system = conversation[:1] if conversation[0].role == "system" else ()
        starts = [index for index, message in enumerate(conversation) if message.role == "user"]
        shorter = [(*system, *conversation[start:]) for start in starts]
        return next((some for some in shorter if self._excess(some) <= 0), shorter[-1])

    def _cut_text(self, conversation: Conversation) -> Conversation | str:
        """The conversation with its last message cut to fit; the reason to leave it out if nothing would remain."""
        for _ in range(TRIES):
            excess = self._excess(conversation)
            if excess <= 0:
                return conversation
            ids = token_ids(self.tokenizer, conversation[-1].content)
            kept = ids[excess:] if self.cut == "start" else ids[:-excess]
            if not kept:
                return TOO_LONG
            text = self.tokenizer.decode(kept)
            conversation = (*conversation[:-1], replace(conversation[-1], content=text.strip()))
        return TOO_LONG
