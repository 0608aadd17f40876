"""Rows of the user's data, from JSONL(.gz) or parquet files or the hub, and the conversations in their columns."""

import gzip
import heapq
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from align.errors import InputError
from align.records import Conversation, Message, as_conversation, digest, numbered_jsonl

FILE_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}
ROLES = ("system", "user", "assistant")

Row = Mapping[str, Any]


class Source(Protocol):
    """What `PromptSource` and `PairSource` have in common."""

    @property
    def path(self) -> str: ...
    @property
    def limit(self) -> int | None: ...
    @property
    def hub_split(self) -> str: ...
    @property
    def hub_folder(self) -> str | None: ...


def is_local_path(path: str) -> bool:
    """Whether a source's path names a local file, existing or not, rather than a hub dataset."""
    looks_local = path.startswith((".", "/", "~")) or path.endswith(FILE_SUFFIXES) or not _HUB_ID.fullmatch(path)
    return looks_local or Path(path).exists()


def file_fault(path: str) -> str | None:
    """What is wrong with a local file of rows, as far as can be told without reading it; None if nothing is."""
    local = Path(path).expanduser()
    if not local.exists():
        return f"no such file (looked in {Path.cwd()}); check the path"
    if local.is_dir():
        return f"is a folder; name a file in it that ends in one of {', '.join(FILE_SUFFIXES)}"
    if not local.is_file():
        return "is a pipe or a device, which cannot be read twice; write the rows to a regular file"
    if not local.name.endswith(FILE_SUFFIXES):
        return f"cannot read this kind of file; convert it to one of {', '.join(FILE_SUFFIXES)}"
    return None


def source_rows(source: Source) -> Iterator[tuple[str, Row]]:
    """The rows of a source as (place for error messages, row); with a limit, those that `draw_rows` draws.

    Raises:
        InputError: the file or dataset is missing or empty, or a line is malformed.
    """
    local = is_local_path(source.path)
    numbered: Iterable[tuple[int, Row]] = (
        _file_rows(Path(source.path).expanduser()) if local else enumerate(_hub_rows(source), start=1)
    )
    unit = "line" if local and not source.path.endswith(".parquet") else "row"
    if source.limit is not None:
        numbered = draw_rows(numbered, source.limit)
    empty = True
    for number, row in numbered:
        empty = False
        yield f"{source.path}, {unit} {number}", row
    if empty:
        raise InputError(f"{source.path}: no rows in it; give a source with at least one")


def draw_rows(rows: Iterable[tuple[int, Row]], limit: int) -> list[tuple[int, Row]]:
    """The `limit` numbered rows whose content hashes are lowest, in their original order.

    The first rows of a file would often be all of one kind. The draw depends on neither a seed nor the order of the
    rows, and a larger limit extends a smaller one's draw. All rows are read, and at most `limit` are kept in memory.
    """
    lowest = heapq.nsmallest(limit, rows, key=lambda numbered: (_content_digest(numbered[1]), numbered[0]))
    return sorted(lowest, key=lambda numbered: numbered[0])


def _content_digest(row: Row) -> str:
    return digest(json.dumps(row, sort_keys=True, default=str))


def is_transcript(value: object) -> bool:
    """Whether a value is a conversation, or one of its turns, in hh-rlhf's text form."""
    return isinstance(value, str) and value.startswith(("\n\nHuman:", "\n\nAssistant:"))


def parse_transcript(text: str, place: str) -> Conversation:
    """The conversation of a transcript, hh-rlhf's text form.

    Raises:
        InputError: the text does not start with a turn.
    """
    lead, *parts = _TURN.split(text)
    if lead.strip() or not parts:
        raise InputError(f"{place}: expected '\\n\\nHuman: …\\n\\nAssistant: …', found {text[:40]!r}")
    turns = zip(parts[::2], parts[1::2], strict=True)
    return tuple(Message(_ROLES[speaker], content.strip()) for speaker, content in turns)


def parse_messages(value: Any, column: str, place: str) -> Conversation:
    """The conversation of a column that holds a list of messages.

    Raises:
        InputError: the value is something else, an empty list, or has a message with an unknown role.
    """
    try:
        messages = as_conversation(value)
    except (TypeError, KeyError):
        messages = ()
    if not messages or not all(isinstance(message.content, str) for message in messages):
        raise InputError(f"{place}: `{column}` must be a text or a list of {{role, content}} messages")
    if unknown := [message.role for message in messages if message.role not in ROLES]:
        raise InputError(f"{place}: `{column}` has the role {unknown[0]!r}; use one of {', '.join(ROLES)}")
    return messages


def parse_conversation(value: Any, column: str, place: str) -> Conversation:
    """The conversation of a column that holds a transcript or a list of messages.

    Raises:
        InputError: as for `parse_messages`.
    """
    return parse_transcript(value, place) if is_transcript(value) else parse_messages(value, column, place)


def merge_turns(conversation: Iterable[Message]) -> Conversation:
    """The conversation with consecutive turns of the same role merged, as chat templates require."""
    merged: list[Message] = []
    for message in conversation:
        if merged and merged[-1].role == message.role:
            message = Message(message.role, f"{merged.pop().content}\n\n{message.content}")
        merged.append(message)
    return tuple(merged)


def _file_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """Numbered rows. In a text file the numbers are line numbers, so that the user finds them in an editor."""
    if fault := file_fault(str(path)):
        raise InputError(f"{path}: {fault}")
    if path.name.endswith(".parquet"):
        yield from enumerate(_parquet_rows(path), start=1)
    else:
        yield from _jsonl_rows(path)


def _jsonl_rows(path: Path) -> Iterator[tuple[int, Row]]:
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig") as lines:
            yield from numbered_jsonl(lines, str(path))
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path}: damaged or incomplete ({error}); download it again") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error.reason}); save it as UTF-8") from None
    except PermissionError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); make it readable for this user") from None


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        for batch in pq.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    except PermissionError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); make it readable for this user") from None
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a complete parquet file ({error}); download it again") from None


def _hub_rows(source: Source) -> Iterator[Row]:
    import datasets

    try:
        yield from datasets.load_dataset(source.path, data_dir=source.hub_folder, split=source.hub_split)
    except Exception as error:
        offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in {"1", "true", "yes", "on"}
        remedy = (
            "HF_HUB_OFFLINE is set: unset it, or give a local file"
            if offline
            else "check the name, `hub_split`, `hub_folder` and the network, or give a local file"
        )
        raise InputError(
            f"{source.path}: not a local file, and loading it as a hub dataset failed "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}); {remedy}"
        ) from error
