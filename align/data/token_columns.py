"""Records as the token columns that TRL's trainers take.

Rows are tokenized here and not by TRL, so that a training row is token for token what generation produces: the prompt,
the completion, and the token that ends the turn, where a reward model's score is read. A row longer than the limit is
left out and reported, never truncated: a truncated completion would teach a model not to stop.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from align.data.chat import ChatTokenizer, conversation_ids
from align.data.prompt_fit import require_whole
from align.data.sources import SURE, Intake
from align.errors import InputError
from align.records import Conversation, Demonstration, PreferencePair

IGNORE_INDEX = -100
"""The label of tokens that are excluded from the loss."""

T = TypeVar("T", Demonstration, PreferencePair)


@dataclass(frozen=True)
class TokenColumns:
    """Rows as dictionaries of token ids, and the ids of the records that were too long or refused by the template.

    Each row also has its `length` in tokens (for a pair, the longer side's), by which TRL can group batches.
    `refused` says why for each id.
    """

    rows: tuple[dict[str, Any], ...]
    too_long: tuple[str, ...]
    refused: Mapping[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)


def demonstration_columns(
    tokenizer: ChatTokenizer, demonstrations: Iterable[Demonstration], max_length: int, system_prompt: str | None = None
) -> TokenColumns:
    """`input_ids` and `labels` of each demonstration; the prompt's labels are `IGNORE_INDEX`."""

    def row(demonstration: Demonstration) -> tuple[dict[str, Any], int]:
        prompt, completion = _whole_ids(tokenizer, demonstration.prompt, demonstration.completion, system_prompt)
        ids = prompt + completion
        return {"input_ids": ids, "labels": [IGNORE_INDEX] * len(prompt) + completion}, len(ids)

    return _columns(demonstrations, row, max_length)


def pair_columns(
    tokenizer: ChatTokenizer, pairs: Iterable[PreferencePair], max_length: int, system_prompt: str | None = None
) -> TokenColumns:
    """`prompt_ids`, `chosen_ids`, `rejected_ids` (without the prompt) and `probability` of each pair."""

    def row(pair: PreferencePair) -> tuple[dict[str, Any], int]:
        prompt, chosen = _whole_ids(tokenizer, pair.prompt, pair.chosen[-1].content, system_prompt)
        _, rejected = conversation_ids(tokenizer, pair.prompt, pair.rejected[-1].content, system_prompt)
        ids = {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
        return {**ids, "probability": pair.probability}, len(prompt) + max(len(chosen), len(rejected))

    return _columns(pairs, row, max_length)


def whole_conversations(columns: TokenColumns) -> TokenColumns:
    """Pair columns for a reward model: `chosen_ids` and `rejected_ids` include the prompt."""
    rows = (
        {
            "chosen_ids": row["prompt_ids"] + row["chosen_ids"],
            "rejected_ids": row["prompt_ids"] + row["rejected_ids"],
            "probability": row["probability"],
            "length": row["length"],
        }
        for row in columns.rows
    )
    return TokenColumns(tuple(rows), columns.too_long, columns.refused)


def keep_left_out(columns: TokenColumns, records: Sequence[T], intake: Intake, what: str, max_unusable: float) -> None:
    """Count and keep the records that became no row, with the reason.

    Raises:
        InputError: the template refused more than this share of the records.
    """
    reasons = {**dict.fromkeys(columns.too_long, "longer than max_length"), **columns.refused}
    for record in records:
        if record.id in reasons:
            reason = "refused_by_the_template" if record.id in columns.refused else "too_long"
            place = intake.places.get(record.id, record.id)
            intake.leave_out(f"{what}_{reason}", place, record.to_json(), reasons[record.id])
    if len(columns.refused) > max_unusable * len(records):
        first, why = next(iter(columns.refused.items()))
        raise InputError(
            f"the chat template refuses {len(columns.refused)} of {len(records)} {what}, and `max_unusable` allows a "
            f"share of {max_unusable:g}; the first is {intake.places.get(first, first)}: {why}"
        )


def _whole_ids(
    tokenizer: ChatTokenizer, prompt: Conversation, completion: str, system_prompt: str | None
) -> tuple[list[int], list[int]]:
    require_whole(tokenizer, prompt, system_prompt)
    return conversation_ids(tokenizer, prompt, completion, system_prompt)


def _columns(records: Iterable[T], row: Callable[[T], tuple[dict[str, Any], int]], max_length: int) -> TokenColumns:
    """The rows that `row` makes of the records, without those longer than `max_length`.

    Raises:
        InputError: the template refuses each of the first records, so the fault is its own.
    """
    rows: list[dict[str, Any]] = []
    too_long: list[str] = []
    refused: dict[str, str] = {}
    for number, record in enumerate(records, start=1):
        try:
            columns, length = row(record)
        except InputError as error:
            refused[record.id] = str(error)
            if number == len(refused) == SURE:
                raise
            continue
        if length > max_length:
            too_long.append(record.id)
        else:
            rows.append({**columns, "length": length})
    return TokenColumns(tuple(rows), tuple(too_long), refused)
