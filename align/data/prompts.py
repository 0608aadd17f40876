"""Reads the prompts of all sources and assigns each to one of four disjoint splits.

A row's prompt is read from the column that its source names, or else from the first of these that the row has:

| column | content |
|---|---|
| prompt | a text, or messages |
| messages | a conversation; the prompt is all that precedes its last answer |
| question, instruction (followed by the text in `input`, if any) | a text |
| chosen | a conversation as messages or in hh-rlhf's text form; the prompt is all that precedes its last answer |
"""

import hashlib
import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate

from align.data.sources import Row, is_transcript, merge_turns, parse_conversation, source_rows
from align.errors import InputError
from align.records import SPLITS, Conversation, Message, Prompt, Split, as_dicts, digest
from align.run.reproducibility import derive_seed
from align.run.streaming import SeenOnDisk
from align.settings.blocks import PromptsBlock, PromptSource, SplitBlock

COLUMNS = ("prompt", "messages", "question", "instruction", "chosen")


def read_prompts(block: PromptsBlock) -> list[Prompt]:
    """The prompts of `stream_prompts` as a list."""
    return list(stream_prompts(block))


def stream_prompts(block: PromptsBlock, counts: Counter[str] | None = None) -> Iterator[Prompt]:
    """The distinct prompts of the sources, in order. A repeated prompt keeps its first category and split.

    Args:
        counts: `prompts_repeated` counts the rows that repeat an earlier prompt.

    Raises:
        InputError: a file or dataset is missing, a line is malformed, a row has no prompt or an unknown split, or the
            shares of the splits do not add up to 1.
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
    """The split of a prompt, by the hash of its id and in proportion to the shares.

    When the shares change, a prompt changes its split only if a boundary between two splits moves past its hash.
    """
    point = int.from_bytes(hashlib.sha256(f"split {prompt_id}".encode()).digest()[:8], "big") / 2**64
    bounds = accumulate(getattr(shares, name) for name in SPLITS)
    held = (name for name, bound in zip(SPLITS, bounds, strict=True) if point < bound)
    return next(held, [name for name in SPLITS if getattr(shares, name)][-1])


def with_split(prompts: Iterable[Prompt], splits: Iterable[Split]) -> Iterator[Prompt]:
    """The prompts of the given splits, in order."""
    wanted = set(splits)
    return (prompt for prompt in prompts if prompt.split in wanted)


def draw_prompts(prompts: Sequence[Prompt], limit: int | None, purpose: str) -> list[Prompt]:
    """The `limit` prompts whose ids hash lowest, in their original order; all of them without a limit.

    Args:
        purpose: part of the hash, so that draws for different purposes are independent.
    """
    lowest = sorted(prompts, key=lambda prompt: derive_seed(0, purpose, prompt.id))[:limit]
    chosen = {prompt.id for prompt in lowest}
    return [prompt for prompt in prompts if prompt.id in chosen]


def stream_drawn_prompts(read: Callable[[], Iterable[Prompt]], limit: int | None, purpose: str) -> Iterator[Prompt]:
    """`draw_prompts` without keeping the prompts in memory: with a limit, `read` is called twice."""
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
            f"{place}: the prompt ends with a turn of role {conversation[-1].role}; it must end with one of role user"
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
        raise InputError(
            f"{place}: no column with a prompt (expected {expected}); the row's columns are "
            f"{', '.join(row) or 'none'}; name the right one in the source's `column`"
        )
    return column


def _conversation(row: Row, column: str, place: str) -> Conversation:
    value = row[column]
    if not isinstance(value, str) or is_transcript(value):
        merged = merge_turns(parse_conversation(value, column, place))
        return merged[:-1] if merged[-1].role == "assistant" else merged
    if column == "chosen":
        raise InputError(
            f"{place}: `chosen` is an answer without its prompt (a whole conversation starts with '\\n\\nHuman:'); "
            "give the prompt in a separate column"
        )
    # Alpaca's format keeps the text that an instruction refers to in a separate column.
    text = row.get("input") if column == "instruction" else None
    return (Message("user", f"{value}\n\n{text}" if text else value),)


def _own_split(row: Row, place: str) -> Split | None:
    given = row.get("split")
    if given is None or given == "":
        return None
    found = next((name for name in SPLITS if name == given), None)
    if found is None:
        raise InputError(f"{place}: `split` is {given!r}; it must be one of {', '.join(SPLITS)}, or left out")
    return found
