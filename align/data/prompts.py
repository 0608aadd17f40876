"""Prompts from wherever they are, each in one of four disjoint splits.

The prompt is found in the first of these columns that a row has, or in the one that the source names:

| column | holds |
|---|---|
| prompt | a text, or messages |
| messages | a conversation; the prompt is what comes before its last answer |
| question, instruction (with `input`, where there is one) | a text |
| chosen | a conversation as messages or in hh-rlhf's text form; the prompt is what comes before its last answer |

Conversations stay whole: every turn before the last answer is part of the prompt.
"""

import hashlib
import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Any

from align.data.sources import (
    Row,
    is_transcript,
    merge_neighbours,
    parse_messages,
    parse_transcript,
    source_rows,
)
from align.errors import InputError
from align.records import SPLITS, Conversation, Message, Prompt, Split, as_dicts, digest
from align.run.reproducibility import derive_seed
from align.run.streaming import SeenOnDisk
from align.settings.blocks import PromptsBlock, PromptSource, SplitBlock

COLUMNS = ("prompt", "messages", "question", "instruction", "chosen")


def read_prompts(block: PromptsBlock) -> list[Prompt]:
    """All of `stream_prompts` at once."""
    return list(stream_prompts(block))


def stream_prompts(block: PromptsBlock, counts: Counter[str] | None = None) -> Iterator[Prompt]:
    """Every prompt of the sources, each content once, in their order; the first source's category and split hold.

    Args:
        counts: gets, under `prompts_repeated`, how many rows repeat an earlier prompt.

    Raises:
        InputError: no such file or dataset, a malformed line, a row without a prompt, an unknown split, or shares that
            don't add up to 1.
    """
    if problems := split_problems(block.split):
        raise InputError("\n".join(problems))
    seen, counts = SeenOnDisk(), Counter() if counts is None else counts
    for source in block.sources:
        for place, row in source_rows(source):
            prompt = _prompt(row, place, source, block.split)
            if seen.is_new(prompt.id):
                yield prompt
            else:
                counts["prompts_repeated"] += 1


def split_problems(split: SplitBlock) -> list[str]:
    """What is wrong with the shares of the splits."""
    total = sum(getattr(split, name) for name in SPLITS)
    if abs(total - 1) < 1e-6:
        return []
    return [f"prompts.split: the shares of {', '.join(SPLITS)} add up to {total:g}; make them add up to 1"]


def split_of(prompt_id: str, shares: SplitBlock) -> Split:
    """The split that a prompt falls into by the hash of its id, in proportion to the shares.

    With other shares a prompt moves only where a boundary between two splits has passed over it.
    """
    point = int.from_bytes(hashlib.sha256(f"split {prompt_id}".encode()).digest()[:8], "big") / 2**64
    bounds = accumulate(getattr(shares, name) for name in SPLITS)
    held = (name for name, bound in zip(SPLITS, bounds, strict=True) if point < bound)
    return next(held, [name for name in SPLITS if getattr(shares, name)][-1])


def with_split(prompts: Iterable[Prompt], splits: Iterable[Split]) -> Iterator[Prompt]:
    """The prompts of these splits, in order."""
    wanted = set(splits)
    return (prompt for prompt in prompts if prompt.split in wanted)


def drawn_prompts(prompts: Sequence[Prompt], limit: int | None, purpose: str) -> list[Prompt]:
    """As many prompts as the limit allows: those whose ids hash lowest, whatever their order; all of them without one.

    Args:
        purpose: another one draws others.
    """
    lowest = sorted(prompts, key=lambda prompt: derive_seed(0, purpose, prompt.id))[:limit]
    chosen = {prompt.id for prompt in lowest}
    return [prompt for prompt in prompts if prompt.id in chosen]


def stream_drawn(read: Callable[[], Iterable[Prompt]], limit: int | None, purpose: str) -> Iterator[Prompt]:
    """`drawn_prompts` of prompts that can be read twice, of which it holds none."""
    if limit is None:
        yield from read()
        return
    lowest = heapq.nsmallest(limit, (derive_seed(0, purpose, prompt.id) for prompt in read()))
    if lowest:
        yield from (prompt for prompt in read() if derive_seed(0, purpose, prompt.id) <= lowest[-1])


def _prompt(row: Row, place: str, source: PromptSource, shares: SplitBlock) -> Prompt:
    conversation = _conversation(row, _column(row, place, source.column), place)
    if not any(message.role == "user" and message.content.strip() for message in conversation):
        raise InputError(f"{place}: the prompt is empty; remove the row or give it a text")
    if conversation[-1].role != "user":
        raise InputError(
            f"{place}: the prompt ends with a turn of {conversation[-1].role}; it must end with the user's"
        )
    prompt_id = digest(as_dicts(conversation))
    return Prompt(
        id=prompt_id,
        prompt=conversation,
        split=_own_split(row, place) or split_of(prompt_id, shares),
        category=str(row.get("category") or source.category or ""),
        source=source.path,
    )


def _column(row: Row, place: str, named: str | None) -> str:
    column = named or next((name for name in COLUMNS if row.get(name) is not None), None)
    if column is None or row.get(column) is None:
        expected = f"`{named}`" if named else "one of " + ", ".join(f"`{name}`" for name in COLUMNS)
        there = ", ".join(row) or "none"
        raise InputError(
            f"{place}: no column with a prompt (expected {expected}); the columns there are {there}. "
            "Name the right one with the source's `column`"
        )
    return column


def _conversation(row: Row, column: str, place: str) -> Conversation:
    value = row[column]
    if isinstance(value, str):
        if is_transcript(value):
            return _before_last_answer(parse_transcript(value, place))
        if column == "chosen":
            raise InputError(
                f"{place}: `chosen` is an answer without its prompt (a whole conversation starts with '\\n\\nHuman:'); "
                "give the prompt in a column of its own"
            )
        return (Message("user", _with_input(row, column, value)),)
    return _before_last_answer(parse_messages(value, column, place))


def _with_input(row: Row, column: str, text: str) -> str:
    """The text, with what an instruction is about where that stands in a column of its own."""
    about: Any = row.get("input") if column == "instruction" else None
    return f"{text}\n\n{about}" if about else text


def _before_last_answer(conversation: Conversation) -> Conversation:
    merged = merge_neighbours(conversation)
    return merged[:-1] if merged[-1].role == "assistant" else merged


def _own_split(row: Row, place: str) -> Split | None:
    given = row.get("split")
    if given is None or given == "":
        return None
    found = next((name for name in SPLITS if name == given), None)
    if found is None:
        raise InputError(f"{place}: `split` is {given!r}; it must be one of {', '.join(SPLITS)}, or left out")
    return found
