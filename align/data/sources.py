"""The rows of a source, drawn and read one by one, and what becomes of those that cannot be used."""

import heapq
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, TypeVar

from align.data.layouts import selected
from align.data.reading import BrokenRow, Row, numbered_rows
from align.errors import InputError
from align.records import Row as Record
from align.records import digest
from align.run.streaming import RowFile
from align.settings.data import DataSource

T = TypeVar("T")
LEFT_OUT = "left_out.jsonl"
"""The file in a stage's folder that keeps the rows it left out."""
SURE = 100
"""So many rows at the start of a source, none of them usable, mean that no other will be."""
SHOWN = 3


@dataclass(frozen=True)
class LeftOut(Record):
    """A row that a stage does not use: where it stands, why not, and the row itself as JSON."""

    place: str
    reason: str
    why: str
    row: str


class RowSink(Protocol):
    """What takes the rows left out, such as a file."""

    def add(self, row: Record) -> None: ...


@dataclass
class Intake:
    """What became of the rows that a stage reads.

    `counts` is the stage's own, to which rows left out are added by reason; `left_out` has these alone; `places` says
    where each record comes from, by its id.
    """

    counts: Counter[str] = field(default_factory=Counter)
    file: RowSink | None = None
    places: dict[str, str] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)

    def leave_out(self, reason: str, place: str, row: Any, why: str = "") -> None:
        """Count a row that is not used, and keep it."""
        self.counts[reason] += 1
        self.left_out[reason] += 1
        if self.file is not None:
            self.file.add(LeftOut(place, reason, why, json.dumps(row, ensure_ascii=False, default=str)))


@contextmanager
def open_intake(folder: Path, counts: Counter[str]) -> Iterator[Intake]:
    """An intake that keeps the rows left out in a file of the folder, which is empty if there are none."""
    with RowFile(folder / LEFT_OUT) as file:
        yield Intake(counts, file)


class Unusable:
    """The unusable rows of one source, up to the share of all its rows that it allows."""

    def __init__(self, source: DataSource) -> None:
        self.source = source
        self.read = 0
        self.faults: list[str] = []
        self.count = 0

    def add(self, fault: str) -> None:
        self.count += 1
        if len(self.faults) < SHOWN:
            self.faults.append(fault)
        if self.count == self.read == SURE and self.source.max_unusable < 1:
            raise InputError(f"{self.source.title}: none of the first {SURE} rows can be used:\n{self._listed()}")

    def check(self) -> None:
        """Raise an InputError if there are more than the source allows."""
        if self.count > self.source.max_unusable * self.read:
            share = f"{self.count} of {self.read} rows" if self.read > 1 else "the only row"
            raise InputError(
                f"{self.source.title}: {share} cannot be used, and `max_unusable` allows a share of "
                f"{self.source.max_unusable:g}; mend them, or raise it to have them left out:\n{self._listed()}"
            )

    def _listed(self) -> str:
        return "\n".join(f"  {fault}" for fault in self.faults) + ("\n  …" if self.count > len(self.faults) else "")


def usable(
    source: DataSource, read_row: Callable[[Row, str, str], Iterable[T]], intake: Intake, what: str
) -> Iterator[T]:
    """What `read_row` makes of each row of a source, given the row, its place and the path that it came from.

    A row of which it raises an InputError is unusable: it is left out and counted as `<what>_unusable`.

    Raises:
        InputError: more rows are unusable than the source allows, or as for `source_rows`.
    """
    unusable = Unusable(source)
    for place, path, row in source_rows(source):
        unusable.read += 1
        try:
            if isinstance(row, BrokenRow):
                raise InputError(f"{place}: {row.fault}")
            made = list(read_row(selected(row, source.columns, place), place, path))
        except InputError as error:
            intake.leave_out(f"{what}_unusable", place, row, str(error))
            unusable.add(str(error))
        else:
            yield from made
    unusable.check()


def source_rows(source: DataSource) -> Iterator[tuple[str, str, Row]]:
    """The rows of a source as (place for messages, path, row); with a limit, those that `draw_rows` draws.

    Raises:
        InputError: a file or dataset is missing, damaged or empty.
    """
    every = chain.from_iterable(
        ((place, path, row) for place, row in numbered_rows(source, path)) for path in source.paths
    )
    rows = every if source.limit is None else iter(draw_rows(every, source.limit))
    empty = True
    for row in rows:
        empty = False
        yield row
    if empty:
        raise InputError(f"{source.title}: no rows in it; give a source with at least one")


def draw_rows(rows: Iterable[tuple[str, str, Row]], limit: int) -> list[tuple[str, str, Row]]:
    """The `limit` rows whose content hashes are lowest, in their original order.

    The first rows of a file would often be all of one kind. The draw depends on neither a seed nor the order of the
    rows, and a larger limit extends a smaller one's draw. All rows are read, and at most `limit` are kept in memory.
    """
    lowest = heapq.nsmallest(
        limit, enumerate(rows), key=lambda numbered: (_content_digest(numbered[1][2]), numbered[0])
    )
    return [row for _, row in sorted(lowest, key=lambda numbered: numbered[0])]


def _content_digest(row: Row) -> str:
    return digest(json.dumps(row, sort_keys=True, default=str))
