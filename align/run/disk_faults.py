"""Turns a full disk or a refused file, met while a stage runs, into an error that names the place and the remedy.

Libraries written in other languages raise no OSError. A full disk is therefore also recognised by the texts of their
errors, and by the space that is left.
"""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from align.errors import AlignError, InputError

FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
FULL_DISK_TEXTS = (
    "No space left on device",
    "os error 28",
    "os error 122",
    "Disk quota exceeded",
    # torch.save's ZIP writer, which only notices that less was written than it asked for.
    "unexpected pos",
    "PytorchStreamWriter failed writing file",
)
REFUSALS = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.EIO,
)
REFUSAL_TEXTS = {"os error 13": errno.EACCES, "os error 30": errno.EROFS, "os error 5)": errno.EIO}
ALMOST_FULL = 2**20
"""A failing write is put down to a full disk if fewer bytes than this are left: less than any checkpoint takes."""
WRITE_ERRORS = ("OSError", "RuntimeError", "SafetensorError")


@contextmanager
def explained_disk_faults(run: Path, kept: Path) -> Iterator[None]:
    """Raise a full disk or a refused file as an InputError, whichever library met it. Other errors pass unchanged.

    Args:
        run: the folder that is written to.
        kept: the folder in it that keeps the finished work.

    Raises:
        InputError: in place of the library's error.
    """
    try:
        yield
    except AlignError:
        raise
    except Exception as error:
        if _is_full_disk(error, run):
            raise InputError(
                f"{run}: the disk is full. The finished work is kept in {kept}; free some space and run the same "
                "command to resume, or choose another place with --set output=DIR"
            ) from error
        if message := _refusal(error, run):
            raise InputError(message) from error
        raise


def _is_full_disk(error: BaseException, run: Path) -> bool:
    """Whether the error, or one of its causes, is a disk without space."""
    for cause in _causes(error):
        if isinstance(cause, OSError) and cause.errno in FULL_DISK:
            return True
        if any(text in str(cause) for text in FULL_DISK_TEXTS):
            return True
    may_be_a_write = any(kind.__name__ in WRITE_ERRORS for kind in type(error).__mro__)
    refused = isinstance(error, OSError) and error.errno in REFUSALS
    return may_be_a_write and not refused and _free_bytes(run) < ALMOST_FULL


def _refusal(error: BaseException, run: Path) -> str | None:
    """If the system refused a file: which one, and the remedy."""
    for cause in _causes(error):
        number = cause.errno if isinstance(cause, OSError) else _number_in(str(cause))
        if number not in REFUSALS:
            continue
        name = getattr(cause, "filename", None)
        path = Path(os.fsdecode(name)) if isinstance(name, str | bytes) else run
        if path.absolute().is_relative_to(run.absolute()):
            remedy = "make it writable for this user, or choose another place with --set output=DIR"
        else:
            remedy = "check the path, and that this user may read and write there"
        return f"{path}: cannot be read or written ({os.strerror(number)}); {remedy}"
    return None


def _number_in(text: str) -> int:
    return next((number for part, number in REFUSAL_TEXTS.items() if part in text), 0)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and its causes, nearest first."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _free_bytes(folder: Path) -> int:
    """Bytes that this user may still write to the folder's disk. The folder need not exist yet."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free
