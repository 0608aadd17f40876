"""What a source's path names: a file of some format, a pattern, a folder, or something on the hub."""

import os
import re
from pathlib import Path

from align.settings.data import DataSource

TEXT_FORMATS = ("jsonl", "json", "csv", "tsv", "txt")
BINARY_FORMATS = ("parquet", "arrow")
COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
ALIASES = {"ndjson": "jsonl"}
KINDS = ", ".join(f".{kind}" for kind in (*TEXT_FORMATS, *BINARY_FORMATS))
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
PATTERN = re.compile(r"[*?\[]")


def is_remote(path: str) -> bool:
    """Whether a path has a scheme, such as hf://."""
    return "://" in path


def is_local_path(path: str) -> bool:
    """Whether a source's path names local files or a folder, existing or not, rather than something on the hub."""
    if is_remote(path):
        return False
    looks_local = path.startswith((".", "/", "~")) or file_format(path) is not None or not _HUB_ID.fullmatch(path)
    return looks_local or os.path.exists(path)


def file_format(path: str) -> str | None:
    """The format that a file's name tells, such as 'jsonl' of rows.jsonl.gz; None of an unknown one."""
    name = path.lower()
    for ending in COMPRESSIONS:
        name = name.removesuffix(ending)
    kind = name.rpartition(".")[2] if "." in name else ""
    kind = ALIASES.get(kind, kind)
    return kind if kind in TEXT_FORMATS or kind in BINARY_FORMATS else None


def local_files(source: DataSource) -> tuple[str, ...]:
    """The files and folders on this machine that a source reads and that are there."""
    local = (path for path in source.paths if is_local_path(path))
    return tuple(file for path in local for file in expanded(path) if os.path.exists(file))


def expanded(path: str) -> list[str]:
    """The files that a path or a pattern names, in the order of their names; the path itself if it is no pattern."""
    here = path if is_remote(path) else os.path.expanduser(path)
    if not PATTERN.search(path) or (not is_remote(path) and os.path.exists(here)):
        return [here]
    from fsspec.core import url_to_fs

    files, pattern = url_to_fs(here)
    found = sorted(files.glob(pattern))
    if is_remote(path):
        return [files.unstrip_protocol(file) for file in found]
    return [file if Path(here).is_absolute() else os.path.relpath(file) for file in found]


def file_fault(path: str) -> str | None:
    """What is wrong with local files of rows, as far as can be told without reading them; None if nothing is."""
    found = expanded(path)
    if not found:
        return f"no file matches this pattern (looked in {Path.cwd()}); check it"
    faults = ((name, _one_file_fault(Path(name))) for name in found)
    return next((fault if len(found) == 1 else f"{name}: {fault}" for name, fault in faults if fault), None)


def _one_file_fault(local: Path) -> str | None:
    if not os.path.exists(local):
        return f"no such file (looked in {Path.cwd()}); check the path"
    if local.is_dir():
        return None if _is_dataset_folder(local) else f"is a folder without data; name files in it that end in {KINDS}"
    if not local.is_file():
        return "is a pipe or a device, which cannot be read twice; write the rows to a regular file"
    if file_format(local.name) is None:
        return f"cannot read this kind of file; convert it to one of {KINDS}"
    return None


def _is_dataset_folder(folder: Path) -> bool:
    saved = (folder / "dataset_info.json", folder / "dataset_dict.json")
    return any(path.is_file() for path in saved) or any(
        file_format(name) in BINARY_FORMATS or file_format(name) in TEXT_FORMATS[:4]
        for _, _, names in os.walk(folder)
        for name in names
    )
