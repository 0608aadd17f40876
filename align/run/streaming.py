"""Processes any number of rows in the memory that one window of them takes.

Rows are read one by one and processed a window at a time; a window's results are written before the next window is
read. Each window has a folder for its journals. A stage that was killed starts again from the first window, takes the
finished rows from the journals, and so writes the same bytes, with figures summed in the same order.
"""

import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Generic, Self, TypeVar

from align.records import Row, as_line
from align.run import processes

T = TypeVar("T")
WINDOWS = "windows"
WINDOW_HELP = "prompts processed together; memory use grows with this, not with the number of prompts"
DEFAULT_WINDOW = 1024


@dataclass(frozen=True)
class Window(Generic[T]):
    """Consecutive rows, the folder for their journals, and a label for the progress bar, empty for a sole window."""

    rows: list[T]
    folder: Path
    label: str


def windows(rows: Iterable[T], total: int, size: int, output: Path) -> Iterator[Window[T]]:
    """The rows in windows of `size`.

    Args:
        total: number of rows, for the labels.
        output: the stage's folder, below which the windows' folders lie.
    """
    remaining = iter(rows)
    count = -(-total // size)
    number = 0
    while window := list(islice(remaining, size)):
        number += 1
        label = f", window {number}/{count}" if count > 1 else ""
        yield Window(window, output / WINDOWS / f"{number:06d}", label)


class RowFile:
    """A new JSONL file to which records are added one by one. Only the first rank writes."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", encoding="utf-8") if processes.is_first() else None

    def add(self, row: Row) -> None:
        if self._file is not None:
            self._file.write(as_line(row))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()


class RowFiles:
    """Several `RowFile`s of one folder, open at the same time."""

    def __init__(self, folder: Path, *names: str) -> None:
        self._open = ExitStack()
        self._files = [self._open.enter_context(RowFile(folder / name)) for name in names]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()


class SeenOnDisk:
    """A set of texts, held in a temporary file, so that its memory does not grow with their number."""

    def __init__(self) -> None:
        self._database = scratch_database("create table seen (text text primary key) without rowid")

    def is_new(self, text: str) -> bool:
        """Add the text, and return whether it is new."""
        return self._database.execute("insert or ignore into seen values (?)", (text,)).rowcount == 1

    def __contains__(self, text: str) -> bool:
        return self._database.execute("select 1 from seen where text = ?", (text,)).fetchone() is not None


def scratch_database(schema: str) -> sqlite3.Connection:
    """An empty database with this schema, in a temporary file. It takes 2 MB of memory however large it grows."""
    database = sqlite3.connect("", isolation_level=None)
    database.execute("pragma journal_mode = off")
    database.executescript(schema)
    return database
