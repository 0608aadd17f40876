"""Rows of files, folders and hub datasets, one by one, in the memory that one of them takes.

Hub datasets, folders that `save_to_disk` wrote and Arrow files are read by the `datasets` library, Parquet files by
pyarrow. Text formats are read here, value for value: `datasets` guesses types, so an answer `2020-01-01` would become a
date, `007` the number 7 and `None` a missing value; and it does not say on which line a row stands. Text files may be
compressed, and files may lie wherever `fsspec` reaches (`hf://`, `s3://`).
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

from align.data.paths import BINARY_FORMATS, PATTERN, expanded, file_fault, file_format, is_local_path, is_remote
from align.errors import InputError, first_line
from align.records import json_object
from align.settings.data import DataSource

Row = Mapping[str, Any]
CHUNK = 2**20
"""Characters of a JSON array read at once."""
BATCH = 1024
"""Rows of a parquet file read at once."""


class BrokenRow(dict[str, Any]):
    """A row that is no row: its text, and what is wrong with it."""

    def __init__(self, text: str, fault: str) -> None:
        super().__init__(text=text)
        self.fault = fault


def numbered_rows(source: DataSource, path: str) -> Iterator[tuple[str, Row]]:
    """The rows of one of a source's paths, each with its place for messages.

    Raises:
        InputError: the file, folder or dataset is missing, damaged or of an unknown kind.
    """
    if not is_local_path(path) and not (is_remote(path) and (file_format(path) or PATTERN.search(path))):
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
    try:
        yield from _parquet_rows(path) if kind == "parquet" else _arrow_rows(path)
    except PermissionError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); make it readable for this user") from None
    except Exception as error:
        raise InputError(f"{path}: not a complete {kind} file ({first_line(error)}); download it again") from None


def _parquet_rows(path: str) -> Iterator[Row]:
    """Read as `datasets` reads them, by pyarrow, and in smaller batches: a row group may be the whole file."""
    import fsspec
    import pyarrow.parquet as pq

    with fsspec.open(path, "rb") as file:
        for batch in pq.ParquetFile(file).iter_batches(batch_size=BATCH):
            yield from batch.to_pylist()


def _arrow_rows(path: str) -> Iterator[Row]:
    import datasets

    yield from datasets.load_dataset("arrow", data_files=_literal(path), split="train", streaming=True)


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
