"""What the system refuses while a stage reads and writes its files, told with the place and what to do.

Libraries written in other languages raise no OSError, so a full disk is also known by what they say of it, and by the
space that is left.
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
    # torch.save's zip writer, which only finds that less was written than it asked for.
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
ALMOST_NOTHING = 2**20
"""Bytes left at which a failing write is put down to a full disk: less than any checkpoint takes."""
WRITERS = ("OSError", "RuntimeError", "SafetensorError")


@contextmanager
def disk_faults_told(run: Path, kept: Path) -> Iterator[None]:
    """Tell a full disk and a refused file in words, whichever library met it.

    Args:
        run: the folder that is written to.
        kept: where in it what is finished stays.

    Raises:
        InputError: in place of what the library raised. Errors that have nothing to do with files go on as they are.
    """
    try:
        yield
    except AlignError:
        raise
    except Exception as error:
        if _is_full_disk(error, run):
            raise InputError(
                f"{run}: the disk is full. What is finished is kept in {kept}; free some space and run the same "
                "command to go on, or choose another place with --set output=DIR"
            ) from error
        if told := _refusal(error, run):
            raise InputError(told) from error
        raise


def _is_full_disk(error: BaseException, run: Path) -> bool:
    """Whether the error, or one that it came from, is a disk without space."""
    for cause in _causes(error):
        if isinstance(cause, OSError) and cause.errno in FULL_DISK:
            return True
        if any(text in str(cause) for text in FULL_DISK_TEXTS):
            return True
    writer = any(kind.__name__ in WRITERS for kind in type(error).__mro__)
    refused = isinstance(error, OSError) and error.errno in REFUSALS
    return writer and not refused and _free(run) < ALMOST_NOTHING


def _refusal(error: BaseException, run: Path) -> str | None:
    """What was refused and what to do, where the system refused a file."""
    for cause in _causes(error):
        number = cause.errno if isinstance(cause, OSError) else _number_in(str(cause))
        if number not in REFUSALS:
            continue
        name = getattr(cause, "filename", None)
        path = Path(os.fsdecode(name)) if isinstance(name, str | bytes) else run
        if path.absolute().is_relative_to(run.absolute()):
            remedy = "make it writable for this user, or choose another place with --set output=DIR"
        else:
            remedy = "check the path, and that this user may read and write it"
        return f"{path}: cannot be read or written ({os.strerror(number)}); {remedy}"
    return None


def _number_in(text: str) -> int:
    return next((number for part, number in REFUSAL_TEXTS.items() if part in text), 0)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and those that it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _free(folder: Path) -> int:
    """Bytes that this user may still write beside the folder."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free
