"""How a run of several processes tells its one error once, with its own exit code.

Each process that fails would print its error, and `accelerate launch` a page of its own, and end with 1 whatever was
wrong. So `align launch` names a file; the first process to fail writes its error there, the others keep quiet, and
`align launch` tells it last.
"""

import json
import os
from pathlib import Path

from align.errors import AlignError

FAILURE = "ALIGN_FAILURE"


def note_failure(error: AlignError) -> bool:
    """Leave the error for `align launch`; returns whether it asked for that and can be told."""
    path = os.environ.get(FAILURE)
    if not path:
        return False
    try:
        with open(path, "x", encoding="utf-8") as note:
            json.dump({"exit_code": error.exit_code, "text": str(error)}, note)
    except FileExistsError:
        pass
    except OSError:
        return False
    return True


def is_noted() -> bool:
    """Whether another process failed already, so that what fails here follows from it."""
    path = os.environ.get(FAILURE)
    return bool(path) and os.path.exists(str(path))


def read_failure(path: Path) -> AlignError | None:
    """The error that a process left."""
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    error = AlignError(note["text"])
    error.exit_code = note["exit_code"]
    return error
