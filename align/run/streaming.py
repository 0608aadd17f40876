"""Work on any number of rows in the memory that a window of them takes.

Rows are read one by one and worked on a window at a time; what came out is written before the next window is read. Each
window has a folder for its journals: a stage that was killed begins again, finds what its windows had finished in their
journals, and so writes the rows, and adds up the figures, in the same order and to the same bytes.
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
WINDOW_HELP = "prompts worked on together: memory grows with it, and not with how many there are"
DEFAULT_WINDOW = 1024


@dataclass(frozen=True)
class Window(Generic[T]):
    """Some rows, in order; the folder for their journals; and which window it is, for a progress bar: empty where there
    is one alone."""

    rows: list[T]
    folder: Path
    label: str


def windows(rows: Iterable[T], total: int, size: int, output: Path) -> Iterator[Window[T]]:
    """The rows, `size` at a time.

    Args:
        total: how many rows there are, for the labels.
        output: the stage's folder; the windows' folders come below it.
    """
    waiting = iter(rows)
    count = -(-total // size)
    number = 0
    while some := list(islice(waiting, size)):
        number += 1
        label = f", window {number}/{count}" if count > 1 else ""
        yield Window(some, output / WINDOWS / f"{number:06d}", label)


class RowFile:
    """A new JSONL file that records are added to one by one. Only the first process writes."""

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
    """Several such files of a folder, written side by side."""

    def __init__(self, folder: Path, *names: str) -> None:
        self._open = ExitStack()
        self._files = [self._open.enter_context(RowFile(folder / name)) for name in names]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()


class SeenOnDisk:
    """Which texts came before, kept in a file that goes by itself. A set would grow with them."""

    def __init__(self) -> None:
        self._database = scratch_database("create table seen (text text primary key) without rowid")

    def is_new(self, text: str) -> bool:
        """Whether the text comes for the first time; it has been seen from here on."""
        return self._database.execute("insert or ignore into seen values (?)", (text,)).rowcount == 1

    def __contains__(self, text: str) -> bool:
        return self._database.execute("select 1 from seen where text = ?", (text,)).fetchone() is not None


def scratch_database(schema: str) -> sqlite3.Connection:
    """An empty database with this schema, in a temporary file: it takes 2 MB of memory however large it grows."""
    database = sqlite3.connect("", isolation_level=None)
    database.execute("pragma journal_mode = off")
    database.executescript(schema)
    return database
