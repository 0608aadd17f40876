"""The errors that end the program with a message, and the exit code of each.

To add one, subclass `InputError` if the user can correct the input (exit code 2), or `AlignError` if the fault is the
program's or the machine's (exit code 1). The message names the file, key or line, then the fault, then the remedy.
"""

import errno
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

MAX_NAME, MAX_PATH = 255, 4095
"""Bytes of a file's name and path that Linux and most file systems allow."""


class AlignError(Exception):
    """A failure that ends the program with a message instead of a traceback."""

    exit_code = 1


class InputError(AlignError):
    """The user's input is wrong; the message says where, what is wrong, and how to correct it."""

    exit_code = 2


@dataclass(frozen=True)
class Problem:
    """One fault in a file: its key, what is wrong, and its line (from 1; None if the key is on no line)."""

    key: str
    fault: str
    line: int | None = None

    def __str__(self) -> str:
        place = f"line {self.line}  " if self.line is not None else ""
        key = f"{self.key}: " if self.key else ""
        return f"{place}{key}{self.fault}"


class FileProblems(InputError):
    """All the faults found in one file, reported together."""

    def __init__(self, source: str, problems: Sequence[Problem]) -> None:
        self.source = source
        self.problems = tuple(sorted(problems, key=lambda problem: (problem.line is None, problem.line or 0)))
        count = f"{len(self.problems)} problem" + ("s" if len(self.problems) > 1 else "")
        super().__init__("\n".join([f"{source}: {count}", *(f"  {problem}" for problem in self.problems)]))


class NotFinite(AlignError):
    """A loss, reward or gradient is NaN or infinite; the message names the step and the prompt."""


class WorldSizeError(InputError):
    """The number of processes that started is not the number that was requested."""


class GateClosed(AlignError):
    """A gate's share is over its limit, so the generated rows are not trained on; they and their journals are kept."""


class JudgeAtChance(InputError):
    """The judge is not shown to be better than chance on the constitution's probes, or on human preference pairs."""


def name_fault(path: str) -> str | None:
    """Why no file can have this path; None if one can. Python raises an error for names that are too long."""
    parts = path.encode(errors="replace").split(b"/")
    if max(map(len, parts)) <= MAX_NAME and len(path.encode(errors="replace")) <= MAX_PATH:
        return None
    return f"longer than a file's path can be ({MAX_NAME} bytes a name, {MAX_PATH:,} in all); check the path"


def first_line(error: BaseException) -> str:
    """The first line of a library's error message, or the error's type if the message is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def explained_read_errors(path: Path, limit: int | None = None) -> Iterator[None]:
    """Raise a failure to open or decode a text file as an `InputError` that names the file and the remedy.

    Devices and pipes, some of which never end, are refused, and so are files of more than `limit` bytes.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
            raise InputError(f"{path}: not a regular file but a device or a pipe; copy its content to a file")
        if limit is not None and status.st_size > limit:
            raise InputError(f"{path}: {status.st_size:,} bytes, the limit is {limit:,}; check the path")
        yield
    except FileNotFoundError:
        raise InputError(f"{path}: no such file (looked in {Path.cwd()}); check the path") from None
    except IsADirectoryError:
        raise InputError(f"{path}: is a folder, expected a file; check the path") from None
    except OSError as error:
        raise InputError(f"{_shortened(path)}: cannot be read ({error.strerror}); {_remedy(error)}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None


def _shortened(path: Path, width: int = 200) -> str:
    return text if len(text := str(path)) <= width else text[:width] + "…"


def _remedy(error: OSError) -> str:
    return "check the path" if error.errno == errno.ENAMETOOLONG else "make it readable for this user"
