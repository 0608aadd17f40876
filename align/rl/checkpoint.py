"""Resumable state of a PPO run: trained parameters, optimizer state and the few numbers that nothing else determines.

Everything random derives from the recipe's seed and the iteration, so no generator has a state to keep.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from align import processes

FOLDER = "checkpoint"
NUMBERS = "numbers.json"


def save(output: Path, iteration: int, numbers: dict[str, Any], write: Callable[[Path], None]) -> None:
    """Keep the state after `iteration` iterations, then remove the checkpoint before it. Call in every process.

    Args:
        write: puts parameters and optimizer state into a folder; called in every process.
    """
    final = output / FOLDER / f"iteration-{iteration:06d}"
    temporary = final.with_name(f".{final.name}")
    if processes.is_first():
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    processes.barrier()
    write(temporary)
    processes.barrier()
    if processes.is_first():
        (temporary / NUMBERS).write_text(json.dumps({"iteration": iteration, **numbers}))
        for file in temporary.rglob("*"):
            _flush(file)
        os.replace(temporary, final)
        for earlier in sorted(final.parent.glob("iteration-*"))[:-1]:
            shutil.rmtree(earlier)
    processes.barrier()


def _flush(path: Path) -> None:
    """Have the file on disk before the checkpoint before it is removed: a machine may lose its power."""
    if path.is_file():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def newest(output: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint's folder and its numbers, or None where there is no checkpoint."""
    saved = sorted((output / FOLDER).glob("iteration-*"))
    return (saved[-1], json.loads((saved[-1] / NUMBERS).read_text())) if saved else None
