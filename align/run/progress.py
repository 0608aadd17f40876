"""The progress bar of long work on rows: those finished, and parts of those that are not, with the time left."""

import sys
from types import TracebackType
from typing import Self

from tqdm import tqdm

from align.run import processes

_FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} [{elapsed}<{remaining}]"
_SECONDS_BETWEEN = {True: 0.2, False: 10.0}
"""Between two states of the bar: in a terminal, and in a file, where each of them is a line that stays."""


def hide_loading_bars() -> None:
    """Load models without the bars of transformers, where a person waits for an answer; downloads keep theirs."""
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging

    downloads_shown = not are_progress_bars_disabled()
    logging.disable_progress_bar()  # switches the hub's off too
    if downloads_shown:
        enable_progress_bars()


class RowBar:
    """A bar over rows that are worked on in chunks, shown in the first process.

    Args:
        total: rows of the whole work.
        done: rows that were finished before.
    """

    def __init__(self, total: int, done: int, description: str) -> None:
        self._bar = tqdm(
            total=total,
            initial=done,
            desc=description,
            bar_format=_FORMAT,
            mininterval=_SECONDS_BETWEEN[sys.stderr.isatty()],
            smoothing=0,  # rows that end early jump ahead: the mean speed tells the time left better than the latest
            disable=not processes.is_first(),
        )
        self._before = done
        self._finished = 0
        self._chunk = 0

    @property
    def reached(self) -> float:
        """Rows' worth of work that is done."""
        return float(self._bar.n)

    def begin(self, rows: int) -> None:
        """A chunk of so many rows begins; the one before it has ended."""
        self._before += self._chunk
        self._chunk, self._finished = rows, 0
        self._reach(self._before)

    def part(self, share: float) -> None:
        """So much of the chunk is done, in [0, 1]."""
        self._reach(self._before + share * self._chunk)

    def row(self) -> None:
        """A row of the chunk is finished."""
        self._finished += 1
        self._reach(self._before + self._finished)

    def _reach(self, rows: float) -> None:
        if not self._bar.disable and rows > self._bar.n:
            self._bar.n = rows
            self._bar.update(0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        self._bar.close()
