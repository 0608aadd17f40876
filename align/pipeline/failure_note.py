"""How a run of several processes tells its one error once, with its own exit code where that can be had.

Each process that fails would print its error, and launchers add pages of their own, and end with 1 whatever was wrong.
So the first process to fail leaves a note, and the others keep quiet. `align launch` names the file of the note, and
tells it last. Where somebody typed `accelerate launch`, the note lies beside the error files that torch's launcher
names for its processes: the first to fail tells its error, and puts it into its error file, which ends the launcher's
page.
"""

import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from align.errors import AlignError

FAILURE = "ALIGN_FAILURE"
LAUNCHERS = "TORCHELASTIC_ERROR_FILE"


def note_failure(error: AlignError) -> bool:
    """Leave the error as this run's; returns whether it is told elsewhere, so that this process keeps quiet."""
    path = _note()
    if path is None:
        return False
    try:
        is_first = _leave(path, {"exit_code": error.exit_code, "text": str(error), "pid": os.getpid()})
    except OSError:
        return False
    if not is_first or os.environ.get(FAILURE):
        return True
    _show_launcher(error)
    return False


def _leave(path: Path, note: dict[str, Any]) -> bool:
    """Write the note whole, unless there is one; whether it is this one."""
    own = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        own.write_text(json.dumps(note), encoding="utf-8")
        os.link(own, path)
    except FileExistsError:
        return False
    finally:
        own.unlink(missing_ok=True)
    return True


def follows_from_another() -> bool:
    """Whether another process failed first, so that what fails here follows from it."""
    path = _note()
    return path is not None and path.exists() and _read(path).get("pid") != os.getpid()


def read_failure(path: Path) -> AlignError | None:
    """The error that a process left for `align launch`."""
    note = _read(path)
    if not note:
        return None
    error = AlignError(note["text"])
    error.exit_code = note["exit_code"]
    return error


def _note() -> Path | None:
    if path := os.environ.get(FAILURE):
        return Path(path)
    if path := os.environ.get(LAUNCHERS):
        # A folder for each process, in one for each attempt.
        return Path(path).parents[1] / "align-failure.json"
    return None


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, json.JSONDecodeError):
        return {}


def _show_launcher(error: AlignError) -> None:
    """Write the file from which torch's launcher takes what it says of a failed process."""
    report = {"message": {"message": str(error), "extraInfo": {"timestamp": int(time.time())}}}
    with suppress(OSError):
        Path(os.environ[LAUNCHERS]).write_text(json.dumps(report), encoding="utf-8")
