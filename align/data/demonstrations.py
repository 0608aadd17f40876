"""Reads demonstrations: prompts with the answer to imitate."""

from collections.abc import Iterator
from typing import Any

from align.data.conversations import parse_messages, with_system
from align.data.layouts import RANKED, canonical
from align.data.reading import Row
from align.data.row_conversations import is_answered, number, refuse_tools, require, split_answer, whole_conversation
from align.data.sources import Intake, usable
from align.errors import InputError
from align.records import Conversation, Demonstration, as_dicts, digest
from align.settings.data import PairSource


def read_demonstrations(source: PairSource, intake: Intake | None = None) -> list[Demonstration]:
    """The distinct demonstrations of a source: of a preference pair the chosen answer, of ranked answers the best.

    Left out, and counted under `demonstrations_<reason>`, are rows that cannot be used, conversations that do not end
    with an answer to a user, empty answers, and answers that are labelled as bad.

    Raises:
        InputError: as for `read_pairs`.
    """
    intake = Intake() if intake is None else intake

    def read_row(row: Row, place: str, path: str) -> Iterator[Demonstration]:
        found = _demonstration(canonical(row, place), place, source.name or path)
        if isinstance(found, str):
            intake.leave_out(f"demonstrations_{found}", place, row)
        else:
            intake.places.setdefault(found.id, place)
            yield found

    found: dict[str, Demonstration] = {}
    for demonstration in usable(source, read_row, intake, "demonstrations"):
        intake.counts["demonstrations_repeated"] += demonstration.id in found
        found.setdefault(demonstration.id, demonstration)
    if not found:
        raise InputError(no_usable_row(source, intake))
    return list(found.values())


def no_usable_row(source: PairSource, intake: Intake) -> str:
    """The error that a source gave nothing, with the reasons."""
    why = ", ".join(f"{count} {name}" for name, count in intake.counts.items() if count)
    return f"{source.title}: no usable row ({why}); each row needs an answer to a user"


def _demonstration(row: dict[str, Any], place: str, source: str) -> Demonstration | str:
    """The row's demonstration, or the reason to leave it out."""
    if row.get("is_label") and not row["score"]:
        return "labelled_as_bad"
    prompt, completion = split_answer(_conversation(row, place), place)
    if not is_answered(prompt, completion):
        return "with_odd_turns"
    if not completion.content.strip():
        return "empty"
    key = digest([as_dicts(prompt), completion.content])
    return Demonstration(key, prompt, completion.content, source)


def _conversation(row: dict[str, Any], place: str) -> Conversation:
    if row.get("messages") is not None:
        return whole_messages(row, place)
    if RANKED in row:
        row = {**row, "completion": max(row[RANKED], key=lambda answer: number(answer[1], "score", place))[0]}
    elif row.get("chosen") is not None:
        return whole_conversation(row, "chosen", place)
    require(row, ("prompt", "completion"), place)
    return whole_conversation(row, "completion", place)


def whole_messages(row: dict[str, Any], place: str) -> Conversation:
    """The conversation of a row that has it in `messages`."""
    refuse_tools(row, place)
    return with_system(parse_messages(row["messages"], "messages", place), row.get("system"), place)
