"""The progress bar of long work on rows: it counts finished rows and parts of unfinished ones, and the time left."""

import sys
from types import TracebackType
from typing import Self

from tqdm import tqdm

from align.run import processes

_FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} [{elapsed}<{remaining}]"
_SECONDS_BETWEEN = {True: 0.2, False: 10.0}
"""Seconds between updates of the bar: few in a terminal, more in a file, where each update stays as a line."""


def hide_loading_bars() -> None:
    """Hide the bars with which transformers loads models, for interactive use; downloads keep theirs."""
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging

    downloads_shown = not are_progress_bars_disabled()
    logging.disable_progress_bar()  # also disables the hub's bars
    if downloads_shown:
        enable_progress_bars()


class RowBar:
    """A bar over rows that are processed in chunks, shown on the first rank.

    Args:
        total: number of rows in all.
        done: number of rows that an earlier run finished.
    """

    def __init__(self, total: int, done: int, description: str) -> None:
        self._bar = tqdm(
            total=total,
            initial=done,
            desc=description,
            bar_format=_FORMAT,
            mininterval=_SECONDS_BETWEEN[sys.stderr.isatty()],
            smoothing=0,  # rows that end early make the bar jump: mean speed predicts the time left better than latest
            disable=not processes.is_first(),
        )
        self._before = done
        self._finished = 0
        self._chunk = 0

    @property
    def reached(self) -> float:
        """The work done so far, in rows."""
        return float(self._bar.n)

    def begin(self, rows: int) -> None:
        """Start a chunk of so many rows; the chunk before it is finished."""
        self._before += self._chunk
        self._chunk, self._finished = rows, 0
        self._reach(self._before)

    def part(self, share: float) -> None:
        """Report the share of the chunk that is done, in [0, 1]."""
        self._reach(self._before + share * self._chunk)

    def row(self) -> None:
        """Report that one row of the chunk is finished."""
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
