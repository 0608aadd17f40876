"""Lets a run of several processes print its error once, and end with that error's exit code where possible.

Without this, each process that fails would print its error, and launchers would add pages of their own and exit with 1
whatever was wrong. Therefore the first process to fail leaves a note, and the others stay silent. Under `align launch`,
which names the note's file, only `align launch` prints the error, at the end. If the user typed `accelerate launch`,
the note lies beside the error files that torch's launcher names for its processes. The first process to fail then
prints its error, and writes it to its error file, from which it appears as the last lines of the launcher's page.
"""

import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from align.errors import AlignError

FAILURE_VARIABLE = "ALIGN_FAILURE"
LAUNCHER_VARIABLE = "TORCHELASTIC_ERROR_FILE"


def note_failure(error: AlignError) -> bool:
    """Note the error as this run's, unless another came first. Returns whether another process prints the run's error,
    so that this one must not."""
    path = _note_path()
    if path is None:
        return False
    try:
        is_first = _write_if_absent(path, {"exit_code": error.exit_code, "text": str(error), "pid": os.getpid()})
    except OSError:
        return False
    if not is_first or os.environ.get(FAILURE_VARIABLE):
        return True
    _write_launcher_error(error)
    return False


def another_failed_first() -> bool:
    """Whether another process failed before this one, so that this one's failure is a consequence."""
    path = _note_path()
    return path is not None and path.exists() and _read(path).get("pid") != os.getpid()


def read_failure(path: Path) -> AlignError | None:
    """The error that a process noted for `align launch`."""
    note = _read(path)
    if not note:
        return None
    error = AlignError(note["text"])
    error.exit_code = note["exit_code"]
    return error


def _write_if_absent(path: Path, note: dict[str, Any]) -> bool:
    """Write the note atomically, unless there is one; returns whether it was written."""
    own = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        own.write_text(json.dumps(note), encoding="utf-8")
        os.link(own, path)
    except FileExistsError:
        return False
    finally:
        own.unlink(missing_ok=True)
    return True


def _note_path() -> Path | None:
    if path := os.environ.get(FAILURE_VARIABLE):
        return Path(path)
    if path := os.environ.get(LAUNCHER_VARIABLE):
        # The launcher makes a folder for each process, inside one for each attempt.
        return Path(path).parents[1] / "align-failure.json"
    return None


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, json.JSONDecodeError):
        return {}


def _write_launcher_error(error: AlignError) -> None:
    """Write the file from which torch's launcher takes the message of a failed process."""
    report = {"message": {"message": str(error), "extraInfo": {"timestamp": int(time.time())}}}
    with suppress(OSError):
        Path(os.environ[LAUNCHER_VARIABLE]).write_text(json.dumps(report), encoding="utf-8")
