"""Reads the prompts of all sources and assigns each to one of four disjoint splits.

A row's prompt is read from the column that its source names, or else found by the row's layout (`layouts`): a prompt,
or all of a conversation that precedes its last answer.
"""

import hashlib
import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate

from align.data.conversations import is_text, merge_turns, parse_conversation, with_system
from align.data.layouts import GIVEN, canonical
from align.data.reading import Row
from align.data.row_conversations import category_of, refuse_tools
from align.data.sources import Intake, usable
from align.errors import InputError
from align.records import SPLITS, Conversation, Message, Prompt, Split, as_dicts, digest
from align.run.reproducibility import derive_seed
from align.run.streaming import SeenOnDisk
from align.settings.data import PromptsBlock, PromptSource, SplitBlock

COLUMNS = ("prompt", "messages", "question", "instruction", "chosen")
ODD_SPLIT = "prompts_with_a_split_of_another_kind"
"""Counts rows whose `split` is none of ours, such as a hub dataset's own 'train': the shares decide for them."""
TOO_LONG = "too_long"
CUT = "prompts_cut"
"""Counts the prompts that were too long and were cut, as the recipe says."""
Fit = Callable[[Conversation], Conversation | str]
"""What becomes of a prompt that a model must read: the prompt, cut or not, or the reason to leave it out."""


def read_prompts(block: PromptsBlock) -> list[Prompt]:
    """The prompts of `stream_prompts` as a list."""
    return list(stream_prompts(block))


def stream_prompts(block: PromptsBlock, intake: Intake | None = None, fit: Fit | None = None) -> Iterator[Prompt]:
    """The distinct prompts of the sources, in order. A repeated prompt keeps its first category and split.

    Args:
        intake: counts the rows that repeat an earlier prompt as `prompts_repeated`, and those left out.
        fit: is asked about each prompt; it raises an InputError where the chat template refuses one.

    Raises:
        InputError: a file or dataset is missing, more rows are unusable than a source allows, or the shares of the
            splits do not add up to 1.
    """
    if problems := split_problems(block.split):
        raise InputError("\n".join(problems))
    seen, intake = SeenOnDisk(), Intake() if intake is None else intake
    for source in block.sources:
        for prompt in _of_source(source, block.split, intake, fit):
            if seen.is_new(prompt.id):
                yield prompt
            else:
                intake.counts["prompts_repeated"] += 1


def _of_source(source: PromptSource, shares: SplitBlock, intake: Intake, fit: Fit | None) -> Iterator[Prompt]:
    def read_row(row: Row, place: str, path: str) -> Iterator[Prompt]:
        conversation = prompt_of(row, place, source.column)
        try:
            fitted = fit(conversation) if fit else conversation
        except InputError as error:
            raise InputError(f"{place}: {error}") from None
        if isinstance(fitted, str):
            intake.leave_out(f"prompts_{fitted}", place, row)
            return
        prompt_id = digest(as_dicts(fitted))
        split = _own_split(row)
        intake.counts[ODD_SPLIT] += split is None and row.get("split") not in (None, "")
        intake.counts[CUT] += fitted != conversation
        category = category_of(row) or source.category or ""
        yield Prompt(prompt_id, fitted, split or split_of(prompt_id, shares), category, path)

    return usable(source, read_row, intake, "prompts")


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


def prompt_of(row: Row, place: str, named: str | None = None) -> Conversation:
    """The conversation that a row asks a model to go on with.

    Args:
        named: the column that holds it, if the source names one.

    Raises:
        InputError: there is none, it is empty, or it ends with an assistant's turn.
    """
    form = row if named else canonical(row, place)
    refuse_tools(form, place)
    conversation = _conversation(form, _column(form, place, named), place)
    conversation = with_system(conversation, form.get("system"), place)
    if not any(message.role in ("user", "tool") and message.content.strip() for message in conversation):
        raise InputError(f"{place}: the prompt is empty; remove the row or give it a text")
    if conversation[-1].role not in ("user", "tool"):
        raise InputError(
            f"{place}: the prompt ends with a turn of role {conversation[-1].role}; it must end with one of role user"
        )
    return conversation


def _column(row: Row, place: str, named: str | None) -> str:
    column = named or next((name for name in COLUMNS if row.get(name) is not None), None)
    if column is None or row.get(column) is None:
        expected = f"`{named}`" if named else "one of " + ", ".join(f"`{name}`" for name in COLUMNS)
        raise InputError(
            f"{place}: no column with a prompt (expected {expected}); the row's columns are "
            f"{', '.join(row.get(GIVEN, row)) or 'none'}; name the right one in the source's `column`"
        )
    return column


def _conversation(row: Row, column: str, place: str) -> Conversation:
    value = row[column]
    if not is_text(value):
        merged = merge_turns(parse_conversation(value, column, place))
        return merged[:-1] if merged[-1].role == "assistant" else merged
    if column == "messages":
        raise InputError(f"{place}: `messages` must be a list of {{role, content}} messages, found {value[:40]!r}")
    if column == "chosen":
        raise InputError(
            f"{place}: `chosen` is an answer without its prompt (a whole conversation starts with '\\n\\nHuman:'); "
            "give the prompt in a separate column"
        )
    # Alpaca's format keeps the text that an instruction refers to in a separate column.
    text = row.get("input") if column == "instruction" else None
    return (Message("user", f"{value}\n\n{text}" if text else value),)


def _own_split(row: Row) -> Split | None:
    given = row.get("split")
    return next((name for name in SPLITS if name == given), None)
