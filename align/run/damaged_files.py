"""Damaged files of a run: finds them before they are used, and says what to remove so that the run can resume."""

import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

from align.errors import InputError


def damaged(path: Path, why: object, remove: Path | None = None) -> InputError:
    """The error for a damaged file; `remove` is what the user must remove, if that is more than the file itself."""
    return InputError(f"{path}: damaged ({why}); remove {remove or 'it'} and run again")


def check_files(folder: Path) -> None:
    """Check that every weights, state and JSON file of a checkpoint is whole.

    Raises:
        InputError: one is damaged. Without the folder, the run resumes from the checkpoint before it, or starts over.
    """
    for path in sorted(folder.rglob("*")):
        check = CHECKS.get(path.suffix)
        if check is None or not path.is_file():
            continue
        try:
            check(path)
        except (ValueError, KeyError, TypeError, AttributeError, struct.error, zipfile.BadZipFile) as error:
            raise damaged(path, error, folder) from None


def _check_json(path: Path) -> None:
    json.loads(path.read_bytes())


def _check_archive(path: Path) -> None:
    """`torch.save` writes a ZIP archive, whose list of members is at its end."""
    with zipfile.ZipFile(path):
        pass


def _check_safetensors(path: Path) -> None:
    """The format: the header's length, the header in JSON, and as many bytes of tensors as the header says."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > path.stat().st_size:
            raise ValueError("its header is truncated")
        header = json.loads(file.read(length))
    ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
    if path.stat().st_size != 8 + length + max(ends, default=0):
        raise ValueError("its size is not what its header says")


CHECKS: dict[str, Callable[[Path], None]] = {
    ".json": _check_json,
    ".pt": _check_archive,
    ".pth": _check_archive,
    ".bin": _check_archive,
    ".safetensors": _check_safetensors,
}
