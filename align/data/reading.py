"""Rows of files, folders and hub datasets, one by one, in the memory that one of them takes.

Parquet and Arrow files, folders that `save_to_disk` wrote and hub datasets are read by the `datasets` library. Text
formats are read here, value for value: `datasets` guesses types, so an answer `2020-01-01` would become a date, `007`
the number 7 and `None` a missing value; and it does not say on which line a row stands. Any file may be compressed and
may lie wherever `fsspec` reaches (`hf://`, `s3://`).
"""

import csv
import io
import json
import lzma
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from align.errors import InputError, first_line
from align.records import json_object
from align.settings.data import DataSource

Row = Mapping[str, Any]
TEXT_FORMATS = ("jsonl", "json", "csv", "tsv", "txt")
BINARY_FORMATS = {"parquet": "parquet", "arrow": "arrow"}
COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
ALIASES = {"ndjson": "jsonl"}
KINDS = ", ".join(f".{kind}" for kind in (*TEXT_FORMATS, *BINARY_FORMATS))
CHUNK = 2**20
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_PATTERN = re.compile(r"[*?\[]")


class BrokenRow(dict[str, Any]):
    """A row that is no row: its text, and what is wrong with it."""

    def __init__(self, text: str, fault: str) -> None:
        super().__init__(text=text)
        self.fault = fault


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
    from fsspec.core import url_to_fs

    here = str(Path(path).expanduser()) if not is_remote(path) else path
    if not _PATTERN.search(path) or (not is_remote(path) and os.path.exists(here)):
        return [here]
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


def numbered_rows(source: DataSource, path: str) -> Iterator[tuple[str, Row]]:
    """The rows of one of a source's paths, each with its place for messages.

    Raises:
        InputError: the file, folder or dataset is missing, damaged or of an unknown kind.
    """
    if not is_local_path(path) and not (is_remote(path) and (file_format(path) or _PATTERN.search(path))):
        yield from _placed(path, "row", enumerate(_hub_rows(source, path), start=1))
        return
    if is_local_path(path) and (fault := file_fault(path)):
        raise InputError(f"{path}: {fault}")
    for file in expanded(path):
        if Path(file).is_dir():
            yield from _placed(file, "row", enumerate(_folder_rows(source, file), start=1))
        else:
            kind = file_format(file) or ""
            unit = "row" if kind == "json" or kind in BINARY_FORMATS else "line"
            yield from _placed(file, unit, _file_rows(file, kind))


def _placed(path: str, unit: str, rows: Iterable[tuple[int, Row]]) -> Iterator[tuple[str, Row]]:
    return ((f"{path}, {unit} {number}", row) for number, row in rows)


def _file_rows(path: str, kind: str) -> Iterator[tuple[int, Row]]:
    """Numbered rows. In a text file the numbers are line numbers, so that the user finds them in an editor."""
    if kind in BINARY_FORMATS:
        yield from enumerate(_binary_rows(path, kind), start=1)
        return
    with _opened(path) as text:
        if kind == "jsonl":
            yield from _json_lines(text)
        elif kind == "json":
            yield from _json_array(text, path)
        elif kind == "txt":
            lines = ((number, line.rstrip("\r\n")) for number, line in enumerate(text, start=1))
            yield from ((number, {"prompt": line}) for number, line in lines if line.strip())
        else:
            yield from _table_rows(text, "\t" if kind == "tsv" else ",")


@contextmanager
def _opened(path: str) -> Iterator[io.TextIOBase]:
    """The file as text, unpacked."""
    import fsspec
    import zstandard

    try:
        with fsspec.open(path, "rt", encoding="utf-8-sig", compression="infer", newline="") as text:
            yield text
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error.reason}); save it as UTF-8") from None
    except PermissionError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); make it readable for this user") from None
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; check the path") from None
    except (EOFError, OSError, zlib.error, lzma.LZMAError, zstandard.ZstdError, csv.Error) as error:
        raise InputError(f"{path}: damaged or incomplete ({first_line(error)}); download it again") from None


def _json_lines(lines: Iterable[str]) -> Iterator[tuple[int, Row]]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield number, _json_row(line)


def _json_row(text: str) -> Row:
    try:
        return json_object(text)
    except ValueError as error:
        return BrokenRow(text, str(error))


def _json_array(text: io.TextIOBase, path: str) -> Iterator[tuple[int, Row]]:
    """The objects of a JSON array, or of JSON lines under another name, in the memory of a few of them."""
    decoder, waiting, number = json.JSONDecoder(), text.read(CHUNK).lstrip(), 0
    if waiting.startswith("{"):
        text.seek(0)
        yield from _json_lines(text)
        return
    if waiting and not waiting.startswith("["):
        raise InputError(f"{path}: expected a JSON array of rows, found {waiting[:20]!r}; name JSON lines .jsonl")
    waiting = waiting[1:]
    while True:
        waiting = waiting.lstrip(" \t\r\n,")
        if waiting.startswith("]"):
            return
        try:
            value, end = decoder.raw_decode(waiting)
        except (ValueError, RecursionError) as error:
            more = text.read(max(CHUNK, len(waiting)))
            if not more:
                raise InputError(f"{path}, row {number + 1}: not JSON ({error}); mend or download the file") from None
            waiting += more
            continue
        number += 1
        found = value if isinstance(value, dict) else BrokenRow(str(value), "expected a JSON object")
        yield number, found
        waiting = waiting[end:]


def _table_rows(lines: Iterable[str], separator: str) -> Iterator[tuple[int, Row]]:
    """Rows of a table whose first line names the columns. Every value is a text."""
    csv.field_size_limit(2**31 - 1)
    table = csv.DictReader(lines, delimiter=separator, strict=True)
    for row in table:
        if row.pop(None, None) is not None:
            yield table.line_num, BrokenRow(str(dict(row)), "has more values than the first line has columns")
        else:
            yield table.line_num, row


def _binary_rows(path: str, kind: str) -> Iterator[Row]:
    import datasets

    try:
        yield from datasets.load_dataset(BINARY_FORMATS[kind], data_files=_literal(path), split="train", streaming=True)
    except PermissionError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); make it readable for this user") from None
    except Exception as error:
        raise InputError(f"{path}: not a complete {kind} file ({first_line(error)}); download it again") from None


def _literal(path: str) -> str:
    """The path with what `datasets` would take for a pattern escaped."""
    import glob

    return path if is_remote(path) else glob.escape(path)


def _folder_rows(source: DataSource, path: str) -> Iterator[Row]:
    """A folder of `save_to_disk`, with or without splits, or of data files."""
    import datasets

    folder = Path(path)
    if not (folder / "dataset_info.json").is_file() and not (folder / "dataset_dict.json").is_file():
        yield from _hub_rows(source, path)
        return
    try:
        saved = datasets.load_from_disk(path)
    except Exception as error:
        raise InputError(f"{path}: not a complete dataset folder ({first_line(error)}); save it again") from None
    if isinstance(saved, datasets.DatasetDict):
        if source.hub_split not in saved:
            raise InputError(f"{path}: no split '{source.hub_split}'; set `hub_split` to one of {', '.join(saved)}")
        saved = saved[source.hub_split]
    yield from saved


def _hub_rows(source: DataSource, path: str) -> Iterator[Row]:
    import datasets

    options = {"name": source.hub_config, "revision": source.hub_revision, "streaming": source.streaming or None}
    given = {key: value for key, value in options.items() if value is not None}
    try:
        yield from datasets.load_dataset(path, data_dir=source.hub_folder, split=source.hub_split, **given)
    except Exception as error:
        raise InputError(_hub_fault(path, error)) from error


def _hub_fault(path: str, error: Exception) -> str:
    why = f"{type(error).__name__}: {first_line(error)}"
    if "onfig name is missing" in str(error) and (listed := re.search(r"\[(.*?)\]", str(error), re.DOTALL)):
        return f"{path}: has several configurations; set `hub_config` to one of {listed[1]}"
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in {"1", "true", "yes", "on"}:
        remedy = "HF_HUB_OFFLINE is set: unset it, or give a local file"
    else:
        remedy = "check the name, `hub_split`, `hub_folder` and the network, or give a local file"
    return f"{path}: not a local file, and loading it as a hub dataset failed ({why}); {remedy}"
