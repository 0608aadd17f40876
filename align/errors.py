"""What can go wrong, and the exit code each kind ends the program with.

To add one: subclass `InputError` where the person can mend the input (exit code 2) or `AlignError` where the fault is
ours or the machine's (exit code 1). The text names the file, key or line, then the fault, then the remedy.
"""

from collections.abc import Sequence
from dataclasses import dataclass


class AlignError(Exception):
    """A failure that ends the program with a message instead of a traceback."""

    exit_code = 1


class InputError(AlignError):
    """Something the person gave is wrong; the text says where, what and how to mend it."""

    exit_code = 2


@dataclass(frozen=True)
class Problem:
    """One fault in a file: the line it stands on (1-based, None when it has none), the key, and what is wrong."""

    key: str
    fault: str
    line: int | None = None

    def __str__(self) -> str:
        place = f"line {self.line}  " if self.line is not None else ""
        key = f"{self.key}: " if self.key else ""
        return f"{place}{key}{self.fault}"


class FileProblems(InputError):
    """Every fault found in one file, reported together."""

    def __init__(self, source: str, problems: Sequence[Problem]) -> None:
        self.source = source
        self.problems = tuple(sorted(problems, key=lambda problem: (problem.line is None, problem.line or 0)))
        count = f"{len(self.problems)} problem" + ("s" if len(self.problems) > 1 else "")
        super().__init__("\n".join([f"{source}: {count}", *(f"  {problem}" for problem in self.problems)]))


class NotFinite(AlignError):
    """A loss, reward or gradient is NaN or infinite; the text names the step and the prompt."""


class WorldSizeError(InputError):
    """The number of processes that started is not the number that was asked for."""


class GateClosed(AlignError):
    """What was generated is not fit to be trained on: a share over its limit; the rows and their journals are kept."""


class JudgeAtChance(InputError):
    """The judge cannot tell the better from the worse of a constitution's probes, or of pairs that people labelled."""


def first_line(error: BaseException) -> str:
    """The first line of what a library's error says, or its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
