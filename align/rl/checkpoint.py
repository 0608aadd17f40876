"""Resumable state of a PPO run: trained parameters, optimizer state and the few numbers that nothing else determines.

Everything random derives from the recipe's seed and the iteration, so no generator has a state to keep.
"""

import json
import os
import shutil
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from align.run import processes
from align.run.damaged_files import check_files

FOLDER = "checkpoint"
NUMBERS = "numbers.json"


def save(
    output: Path,
    iteration: int,
    numbers: dict[str, Any],
    write: Callable[[Path], None],
    worth_keeping: Callable[[Sequence[int]], Collection[int]],
) -> None:
    """Keep the state after `iteration` iterations, then remove checkpoints before it. Call in every process.

    Args:
        write: puts parameters and optimizer state into a folder; called in every process.
        worth_keeping: which of the earlier checkpoints, given as iterations, stay; called in the first process.
    """
    final = _folder(output, iteration)
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
        *earlier, _ = saved_iterations(output)
        for dropped in set(earlier) - set(worth_keeping(earlier)):
            shutil.rmtree(_folder(output, dropped))
    processes.barrier()


def _folder(output: Path, iteration: int) -> Path:
    return output / FOLDER / f"iteration-{iteration:06d}"


def _flush(path: Path) -> None:
    """Have the file on disk before the checkpoint before it is removed: a machine may lose its power."""
    if path.is_file():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def saved_iterations(output: Path) -> list[int]:
    """The iterations after which there is a checkpoint, ascending."""
    return sorted(int(folder.name.partition("-")[2]) for folder in (output / FOLDER).glob("iteration-*"))


def at(output: Path, iteration: int) -> tuple[Path, dict[str, Any]]:
    """The folder and the numbers of the checkpoint after `iteration` iterations.

    Raises:
        InputError: a file of it is damaged.
    """
    folder = _folder(output, iteration)
    check_files(folder)
    return folder, json.loads((folder / NUMBERS).read_text())


def newest(output: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint's folder and its numbers, or None where there is no checkpoint."""
    saved = saved_iterations(output)
    return at(output, saved[-1]) if saved else None
