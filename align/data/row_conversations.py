"""What a row in one of the forms of `layouts` says: the conversation up to an answer, and the answer."""

import math
from collections.abc import Mapping
from typing import Any

from align.data.conversations import (
    is_text,
    is_transcript,
    merge_turns,
    parse_conversation,
    parse_transcript,
    with_system,
)
from align.data.layouts import GIVEN
from align.errors import InputError
from align.records import Conversation, Message

Row = Mapping[str, Any]


def whole_conversation(row: Row, column: str, place: str) -> Conversation:
    """The conversation that ends with the answer in `column`, with the row's `system` text before it.

    Raises:
        InputError: the column, or the prompt that it needs, is missing or no conversation.
    """
    refuse_tools(row, place)
    return with_system(_conversation(row, column, place), row.get("system"), place)


def split_answer(conversation: Conversation, place: str) -> tuple[Conversation, Message]:
    """The prompt, with consecutive turns of the same role merged, and the last turn.

    Raises:
        InputError: the last turn calls tools, which no stage can teach.
    """
    if '"tool_calls"' in conversation[-1].extras:
        raise InputError(f"{place}: the answer calls tools, and only texts can be taught; remove the row")
    return merge_turns(conversation[:-1]), conversation[-1]


def is_answered(prompt: Conversation, completion: Message) -> bool:
    """Whether the completion is an assistant's turn, to a user or to what a tool returned."""
    return bool(prompt) and prompt[-1].role in ("user", "tool") and completion.role == "assistant"


def require(row: Row, columns: tuple[str, ...], place: str) -> None:
    """Raise an InputError unless the row has the columns."""
    missing = [column for column in columns if row.get(column) is None]
    if missing:
        names = ", ".join(f"`{name}`" for name in missing)
        raise InputError(
            f"{place}: no column {names}; the row's columns are {', '.join(row.get(GIVEN, row)) or 'none'}; `columns` "
            "in the source can say which column holds what"
        )


def refuse_tools(row: Row, place: str) -> None:
    """Raise an InputError if the row declares tools."""
    if row.get("tools") not in (None, "", "[]", []):
        raise InputError(
            f"{place}: declares `tools`, which no stage gives to the chat template; name the columns to read in "
            "`columns` to train without them"
        )


def category_of(row: Row) -> str:
    """The row's category; of a map from names to true or false, or of a list, the names that hold."""
    given = row.get("category")
    if isinstance(given, Mapping):
        given = [name for name, holds in given.items() if holds]
    return ", ".join(map(str, given)) if isinstance(given, list | tuple) else str(given or "")


def number(value: Any, column: str, place: str) -> float:
    """A score as a number; tables keep it as text.

    Raises:
        InputError: it is none, or not a finite one.
    """
    try:
        found = float("nan") if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        found = float("nan")
    if not math.isfinite(found):
        raise InputError(f"{place}: `{column}` must be a number, got {value!r}")
    return found


def _conversation(row: Row, column: str, place: str) -> Conversation:
    require(row, (column,), place)
    completion, prompt = row[column], row.get("prompt")
    if is_text(completion):
        require(row, ("prompt",), place)
        if is_transcript(prompt):
            opening = str(prompt).rstrip().removesuffix("\n\nAssistant:")
            return parse_transcript(f"{opening}\n\nAssistant: {completion}", place)
        return *_prompt(prompt, place), Message("assistant", completion)
    messages = parse_conversation(completion, column, place)
    if prompt is None or (len(messages) > 1 and is_text(prompt)):
        return messages
    before = _prompt(prompt, place)
    return messages if _starts_with(messages, before) else before + messages


def _prompt(value: object, place: str) -> Conversation:
    if isinstance(value, str) and is_text(value):
        return (Message("user", value),)
    messages = parse_conversation(value, "prompt", place)
    return messages[:-1] if messages[-1] == Message("assistant", "") else messages


def _starts_with(messages: Conversation, prompt: Conversation) -> bool:
    """Whether the messages begin with the prompt, apart from outer white space, which transcripts do not keep."""
    whole, start = ([(each.role, each.content.strip()) for each in some] for some in (messages, prompt))
    return whole[: len(start)] == start
