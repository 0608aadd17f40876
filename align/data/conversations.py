"""Conversations in the forms in which people store them: message lists, ShareGPT's, JSON text, hh-rlhf's text."""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from align.errors import InputError
from align.records import Conversation, Message, as_conversation

ROLES = ("system", "developer", "user", "assistant", "tool")
SPEAKERS = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "function": "tool",
    "observation": "tool",
}
"""Names of speakers, in ShareGPT's layout and others, by the role that chat templates know."""
_TURN = re.compile(r"\n\n(Human|Assistant):")
_MESSAGES_AS_TEXT = re.compile(r"\s*\[\s*\{\s*[\"'](role|from|content|value)[\"']\s*:")


def is_transcript(value: object) -> bool:
    """Whether a value is a conversation, or one of its turns, in hh-rlhf's text form."""
    return isinstance(value, str) and value.startswith(("\n\nHuman:", "\n\nAssistant:"))


def is_text(value: object) -> bool:
    """Whether a value is words, and no conversation written as text."""
    return isinstance(value, str) and not is_transcript(value) and not _MESSAGES_AS_TEXT.match(value)


def parse_transcript(text: str, place: str) -> Conversation:
    """The conversation of a transcript, hh-rlhf's text form.

    Raises:
        InputError: the text does not start with a turn.
    """
    lead, *parts = _TURN.split(text)
    if lead.strip() or not parts:
        raise InputError(f"{place}: expected '\\n\\nHuman: …\\n\\nAssistant: …', found {text[:40]!r}")
    turns = zip(parts[::2], parts[1::2], strict=True)
    roles = {"Human": "user", "Assistant": "assistant"}
    return tuple(Message(roles[speaker], content.strip()) for speaker, content in turns)


def parse_messages(value: Any, column: str, place: str) -> Conversation:
    """The conversation of a column that holds a list of messages, or the JSON text of one.

    Messages have the keys role and content, or ShareGPT's from and value. Text parts of a content are joined.

    Raises:
        InputError: the value is something else, an empty list, or has a message with an unknown role, without a
            content, or with an image or the like.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise InputError(f"{place}: `{column}` holds messages as text that is not JSON ({error})") from None
    try:
        messages = as_conversation(_message(each, column, place) for each in value)
    except (TypeError, KeyError, AttributeError):
        messages = ()
    if not messages:
        raise InputError(f"{place}: `{column}` must be a text or a list of {{role, content}} messages")
    if unknown := [message.role for message in messages if message.role not in ROLES]:
        raise InputError(f"{place}: `{column}` has the role {unknown[0]!r}; use one of {', '.join(ROLES)}")
    return messages


def _message(value: Mapping[str, Any], column: str, place: str) -> dict[str, Any]:
    role, content = (value["role"], value["content"]) if value.get("role") else (value["from"], value.get("value"))
    if content is None and value.get("tool_calls"):
        content = ""
    if isinstance(content, list | tuple):
        content = _joined(content, column, place)
    if not isinstance(content, str):
        found = "no content" if content is None else f"a content of type {type(content).__name__}"
        raise InputError(f"{place}: `{column}` must be a text or a list of messages, and one of them has {found}")
    return {**value, "role": SPEAKERS.get(role, role) if isinstance(role, str) else role, "content": content}


def _joined(parts: Iterable[Any], column: str, place: str) -> str:
    texts = []
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
        text = part.get("text") if isinstance(part, Mapping) else part
        if kind != "text" or not isinstance(text, str):
            raise InputError(f"{place}: `{column}` has a message with a part of type {kind!r}; only texts can be read")
        texts.append(text)
    return "".join(texts)


def parse_conversation(value: Any, column: str, place: str) -> Conversation:
    """The conversation of a column that holds a transcript or a list of messages.

    Raises:
        InputError: as for `parse_messages`.
    """
    return parse_transcript(value, place) if is_transcript(value) else parse_messages(value, column, place)


def with_system(conversation: Conversation, system: object, place: str) -> Conversation:
    """The conversation with what its row's `system` column says as the first message.

    Raises:
        InputError: it has another system message of its own.
    """
    if system is None or system == "":
        return conversation
    if not isinstance(system, str):
        raise InputError(f"{place}: `system` must be a text, found {type(system).__name__}")
    own = next((message for message in conversation if message.role == "system"), None)
    if own is None:
        return (Message("system", system), *conversation)
    if own.content.strip() == system.strip():
        return conversation
    raise InputError(f"{place}: `system` says something else than the conversation's own system message")


def merge_turns(conversation: Iterable[Message]) -> Conversation:
    """The conversation with consecutive turns of the same role merged, as chat templates require.

    Results of tools, and messages with a name or calls, stay apart: what belongs to which would be lost.
    """
    merged: list[Message] = []
    for message in conversation:
        last = merged[-1] if merged else None
        if last and last.role == message.role != "tool" and not last.extras and not message.extras:
            message = Message(message.role, f"{merged.pop().content}\n\n{message.content}")
        merged.append(message)
    return tuple(merged)
