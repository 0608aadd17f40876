"""The rows that stages write and read, one JSON object per line. A row's id is a digest of its content.

A row's `provenance` is the id of an entry in the provenance.jsonl beside it (`align.engines.provenance`), which says
how its text or label was made. It is empty for text by people, and in rows from before such entries were written.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from align.errors import InputError, explained_read_errors

Split = Literal["sft", "preference", "rl", "eval"]
SPLITS: tuple[Split, ...] = ("sft", "preference", "rl", "eval")
FinishReason = Literal["stop", "length"]


def digest(value: Any, length: int = 16) -> str:
    """The first `length` hex digits of the SHA-256 of a value's canonical JSON: keys sorted, no white space, UTF-8."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


EXTRAS = ("name", "tool_calls", "tool_call_id")
"""The keys of a message besides role and content that chat templates render."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; `role` is system, developer, user, assistant or tool.

    `extras` is the JSON text of the keys among `EXTRAS` that the message has. As a text it keeps messages hashable.
    """

    role: str
    content: str
    extras: str = ""

    def as_dict(self) -> dict[str, Any]:
        plain = {"role": self.role, "content": self.content}
        return {**plain, **json.loads(self.extras)} if self.extras else plain


Conversation = tuple[Message, ...]


def as_conversation(messages: Iterable[Mapping[str, Any] | Message]) -> Conversation:
    """A tuple of `Message` from messages in either form."""
    return tuple(message if isinstance(message, Message) else _as_message(message) for message in messages)


def _as_message(message: Mapping[str, Any]) -> Message:
    extras = {key: message[key] for key in EXTRAS if message.get(key)}
    return Message(message["role"], message["content"], json.dumps(extras, ensure_ascii=False) if extras else "")


def as_dicts(conversation: Conversation) -> list[dict[str, Any]]:
    """The conversation in the form that chat templates and TRL take."""
    return [message.as_dict() for message in conversation]


def pair_id(prompt: Conversation, chosen: Message, rejected: Message) -> str:
    """A preference pair's id: a digest of its prompt and both its completions."""
    return digest([as_dicts(prompt), chosen.as_dict(), rejected.as_dict()])


CONVERSATIONS = ("prompt", "chosen", "rejected")
"""The keys of rows that hold conversations."""


@dataclass(frozen=True)
class Row:
    """Base class of every record. `to_json` and `from_json` are exact inverses; unknown keys are an error."""

    def to_json(self) -> dict[str, Any]:
        values = {key: getattr(self, key, None) for key in CONVERSATIONS}
        conversations = {key: as_dicts(value) for key, value in values.items() if isinstance(value, tuple)}
        return {**dataclasses.asdict(self), **conversations}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """A record from its JSON object.

        Raises:
            TypeError: a key is missing or unknown.
        """
        converted = {key: _from_plain(key, item) for key, item in value.items()}
        return cls(**converted)


R = TypeVar("R", bound=Row)


def _from_plain(key: str, item: Any) -> Any:
    if key in CONVERSATIONS and isinstance(item, list):
        return as_conversation(item)
    return tuple(item) if isinstance(item, list) else item


@dataclass(frozen=True)
class Prompt(Row):
    """A conversation up to the assistant's turn, the split that it belongs to, and the source that it came from."""

    id: str
    prompt: Conversation
    split: Split
    category: str = ""
    source: str = ""


@dataclass(frozen=True)
class Sample(Row):
    """A completion of a prompt. If `finish_reason` is 'length', the limit truncated it, and it is not trained on.

    A thinking model's `thought` is kept apart (`align.data.answers`). If no answer follows it, the completion is empty
    and its `finish_reason` 'length'.
    """

    id: str
    prompt_id: str
    prompt: Conversation
    completion: str
    finish_reason: FinishReason
    split: Split
    category: str = ""
    engine: str = ""
    seed: int = 0
    provenance: str = ""
    thought: str = ""


@dataclass(frozen=True)
class Demonstration(Row):
    """A prompt and the completion to imitate; `source` is 'revision', 'own' or the path that it was read from.

    If the run generated the completion, `seed` and `provenance` say how. `revised_by`, `judged_by` and `p_better` are
    those of a revision.
    """

    id: str
    prompt: Conversation
    completion: str
    source: str
    seed: int | None = None
    provenance: str = ""
    judge_provenance: str = ""
    revised_by: tuple[str, ...] = ()
    judged_by: tuple[str, ...] = ()
    p_better: float | None = None


@dataclass(frozen=True)
class PreferencePair(Row):
    """A pair in TRL's conversational preference format, with its soft label.

    `prompt`, `chosen` and `rejected` are lists of messages; the latter two hold only the assistant's turn.
    `probability` that `chosen` is better lies in [0.5, 1]. `source` is 'ai', 'human' or 'revision'. `judged_by` names
    the principles that the judge went by, `revised_by` those of each round that led to a chosen revision.
    """

    id: str
    prompt: Conversation
    chosen: Conversation
    rejected: Conversation
    probability: float
    source: str
    category: str = ""
    judged_by: tuple[str, ...] = ()
    revised_by: tuple[str, ...] = ()
    chosen_seed: int | None = None
    rejected_seed: int | None = None
    chosen_provenance: str = ""
    rejected_provenance: str = ""
    judge_provenance: str = ""


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a JSONL file, one at a time; blank lines are skipped.

    Raises:
        InputError: the file is missing or cannot be read, or a line is not a JSON object; names the line's number.
    """
    with explained_read_errors(path), path.open(encoding="utf-8") as lines:
        yield from parse_jsonl(lines, str(path))


def parse_jsonl(lines: Iterable[str], source: str) -> Iterator[dict[str, Any]]:
    """The JSON objects of an iterable of lines; errors name `source`."""
    return (value for _, value in numbered_jsonl(lines, source))


def numbered_jsonl(lines: Iterable[str], source: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """`parse_jsonl` with each object's line number, from 1."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield number, json_object(line)
        except ValueError as error:
            raise InputError(
                f"{source}, line {number}: {error}. "
                f"The {number - 1} lines before it are valid; nothing was written. Correct or remove the line."
            ) from None


def json_object(line: str) -> dict[str, Any]:
    """The JSON object in a line.

    Raises:
        ValueError: there is none; the text says why.
    """
    try:
        value = json.loads(line.rstrip("\r\n"))
        if "\\u" in line:  # an escape can be half a surrogate pair, which no file could be written with
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise ValueError(_json_fault(error)) from None
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, found {type(value).__name__}; write one per line")
    return value


def _json_fault(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON ({error.msg} at column {error.colno})"
    return f"JSON that cannot be read ({'nested too deeply' if isinstance(error, RecursionError) else error})"


def read_rows(path: Path, kind: type[R]) -> Iterator[R]:
    """The records of a stage's JSONL file.

    Raises:
        InputError: as for `read_jsonl`, or a row has a missing or unknown key.
    """
    for number, value in enumerate(read_jsonl(path), start=1):
        try:
            yield kind.from_json(value)
        except (TypeError, KeyError) as error:
            raise InputError(
                f"{path}, row {number}: damaged, or of another version ({error}); remove {path.parent} and run again"
            ) from None


def write_rows(path: Path, rows: Iterable[Row]) -> int:
    """Write records to a new JSONL file; returns their number."""
    count = 0
    with path.open("w", encoding="utf-8") as out:
        for row in rows:
            out.write(as_line(row))
            count += 1
    return count


def as_line(row: Row) -> str:
    """A record as one line of a JSONL file, newline included."""
    return json.dumps(row.to_json(), ensure_ascii=False) + "\n"
