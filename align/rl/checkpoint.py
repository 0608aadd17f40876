"""Checkpoints of a PPO run: trained parameters, optimizer state and a few numbers, such as the KL coefficient.

No random generator's state is saved: all randomness derives from the recipe's seed and the iteration.
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
    """Write the checkpoint of `iteration`, then remove earlier ones. Call in every process.

    Args:
        numbers: JSON-able state that is saved beside the tensors.
        write: writes parameters and optimizer state into a folder; called in every process.
        worth_keeping: given the earlier checkpoints' iterations, returns those to keep; called in the first process.
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
            _sync_to_disk(file)
        os.replace(temporary, final)
        *earlier, _ = saved_iterations(output)
        for outdated in set(earlier) - set(worth_keeping(earlier)):
            shutil.rmtree(_folder(output, outdated))
    processes.barrier()


def _folder(output: Path, iteration: int) -> Path:
    return output / FOLDER / f"iteration-{iteration:06d}"


def _sync_to_disk(path: Path) -> None:
    """Flush a file to disk, so that a power failure after the removal of earlier checkpoints loses nothing."""
    if path.is_file():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def saved_iterations(output: Path) -> list[int]:
    """The iterations that have a checkpoint, ascending."""
    return sorted(int(folder.name.partition("-")[2]) for folder in (output / FOLDER).glob("iteration-*"))


def at(output: Path, iteration: int) -> tuple[Path, dict[str, Any]]:
    """The folder and the numbers of an iteration's checkpoint.

    Raises:
        InputError: one of its files is damaged.
    """
    folder = _folder(output, iteration)
    check_files(folder)
    return folder, json.loads((folder / NUMBERS).read_text())


def newest(output: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint's folder and numbers, or None if there is no checkpoint."""
    saved = saved_iterations(output)
    return at(output, saved[-1]) if saved else None
