"""Files of our own that a broken disk or a hand has damaged: told by name, with what to remove to go on."""

import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

from align.errors import InputError


def damaged(path: Path, why: object, remove: Path | None = None) -> InputError:
    """The error for a damaged file; `remove` is what to remove where that is more than the file."""
    return InputError(f"{path}: damaged ({why}); remove {remove or 'it'} and run again")


def check_files(folder: Path) -> None:
    """Open every weights, state and JSON file of a checkpoint far enough to see that it is whole.

    Raises:
        InputError: one is damaged; without the folder, the run goes on from the checkpoint before it, or starts anew.
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
    """What torch saves is a ZIP archive, whose list of members stands at its end."""
    with zipfile.ZipFile(path):
        pass


def _check_safetensors(path: Path) -> None:
    """The length of a header, the header in JSON, and as many bytes as that tells of."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > path.stat().st_size:
            raise ValueError("its header is cut short")
        header = json.loads(file.read(length))
    ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
    if path.stat().st_size != 8 + length + max(ends, default=0):
        raise ValueError("it has not as many bytes as its header says")


CHECKS: dict[str, Callable[[Path], None]] = {
    ".json": _check_json,
    ".pt": _check_archive,
    ".pth": _check_archive,
    ".bin": _check_archive,
    ".safetensors": _check_safetensors,
}
