"""Rows come out the same whatever kind of file holds them, and wherever it lies."""

import bz2
import gzip
import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from align.data.paths import expanded, file_fault, file_format, is_local_path, local_files
from align.data.reading import CHUNK
from align.data.sources import source_rows
from align.errors import InputError
from align.settings.data import DataSource

ROWS = [{"prompt": f"Question {number}?", "completion": "2020-01-01"} for number in range(7)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def read(path: Any, **options: Any) -> list[Any]:
    given = [str(each) for each in path] if isinstance(path, list) else str(path)
    return [row for _, _, row in source_rows(DataSource(path=given, **options))]


def places(path: Any, **options: Any) -> list[str]:
    return [place.rpartition("/")[2] for place, _, _ in source_rows(DataSource(path=str(path), **options))]


def write_zst(path: Path) -> None:
    import zstandard

    path.write_bytes(zstandard.compress(LINES.encode()))


def write_arrow(path: Path) -> None:
    import pyarrow as pa

    table = pa.Table.from_pylist(ROWS)
    with pa.OSFile(str(path), "wb") as out, pa.ipc.new_stream(out, table.schema) as stream:
        stream.write_table(table)


def write_parquet(path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(ROWS), path)


def write_table(separator: str) -> Callable[[Path], Any]:
    lines = [separator.join(["prompt", "completion"]), *(separator.join(row.values()) for row in ROWS)]
    return lambda path: path.write_text("\n".join(lines))


def save(path: Path) -> None:
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(str(path))


def save_splits(path: Path) -> None:
    import datasets

    train, test = datasets.Dataset.from_list(ROWS), datasets.Dataset.from_list(ROWS[:2])
    datasets.DatasetDict(train=train, test=test).save_to_disk(str(path))


WRITERS: dict[str, Callable[[Path], Any]] = {
    "rows.jsonl": lambda path: path.write_text(LINES),
    "rows.ndjson": lambda path: path.write_text(LINES),
    "lines.json": lambda path: path.write_text(LINES),
    "rows.json": lambda path: path.write_text(json.dumps(ROWS, indent=2)),
    "rows.json.gz": lambda path: path.write_bytes(gzip.compress(json.dumps(ROWS).encode())),
    "rows.jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES.encode())),
    "rows.jsonl.bz2": lambda path: path.write_bytes(bz2.compress(LINES.encode())),
    "rows.jsonl.xz": lambda path: path.write_bytes(lzma.compress(LINES.encode())),
    "rows.jsonl.zst": write_zst,
    "rows.csv": write_table(","),
    "rows.tsv": write_table("\t"),
    "rows.parquet": write_parquet,
    "odd [name]*.parquet": write_parquet,
    "rows.arrow": write_arrow,
    "saved": save,
    "saved_splits": save_splits,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)

    assert file_fault(str(tmp_path / name)) is None
    assert read(tmp_path / name) == ROWS
    assert len(read(tmp_path / name, limit=3)) == 3


def test_the_split_of_a_saved_folder_is_the_one_that_is_named(tmp_path: Path) -> None:
    save_splits(tmp_path / "saved")

    assert read(tmp_path / "saved", hub_split="test") == ROWS[:2]
    with pytest.raises(InputError, match="no split 'dev'; set `hub_split` to one of train, test"):
        read(tmp_path / "saved", hub_split="dev")


def test_a_folder_of_data_files_is_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    write_parquet(tmp_path / "data/train.parquet")
    (tmp_path / "empty").mkdir()

    assert read(tmp_path / "data", streaming=True) == ROWS
    with pytest.raises(InputError, match="is a folder without data"):
        read(tmp_path / "empty")


def test_every_line_of_a_text_is_a_prompt(tmp_path: Path) -> None:
    (tmp_path / "rows.txt").write_text("Who?\n\nWhy?\r\n")

    assert read(tmp_path / "rows.txt") == [{"prompt": "Who?"}, {"prompt": "Why?"}]
    assert places(tmp_path / "rows.txt") == ["rows.txt, line 1", "rows.txt, line 3"]


def test_patterns_and_lists_read_their_files_in_order(tmp_path: Path) -> None:
    for name, rows in {"b": ROWS[2:], "a": ROWS[:2]}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    assert read(tmp_path / "*.jsonl") == ROWS
    assert read([tmp_path / "b.jsonl", tmp_path / "a.jsonl"]) == ROWS[2:] + ROWS[:2]
    assert local_files(DataSource(path=f"{tmp_path}/*.jsonl")) == (f"{tmp_path}/a.jsonl", f"{tmp_path}/b.jsonl")
    with pytest.raises(InputError, match=r"none\*\.jsonl: no file matches this pattern"):
        read(tmp_path / "none*.jsonl")
    drawn = read([tmp_path / "b.jsonl", tmp_path / "a.jsonl"], limit=3)
    assert sorted(map(str, drawn)) == sorted(map(str, read(tmp_path / "*.jsonl", limit=3)))


def test_files_elsewhere_are_read_through_their_file_system() -> None:
    import fsspec

    with fsspec.open("memory://folder/a.jsonl", "w") as out:
        out.write(LINES)
    with fsspec.open("memory://folder/b.json.gz", "wb") as out:
        out.write(gzip.compress(json.dumps(ROWS[:1]).encode()))

    assert read("memory://folder/a.jsonl") == ROWS
    assert read("memory://folder/*") == ROWS + ROWS[:1]
    assert not is_local_path("hf://datasets/org/name/rows.jsonl")
    with pytest.raises(InputError, match="no such file"):
        read("memory://folder/none.jsonl")


def test_the_options_of_a_hub_data_set_are_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    calls: list[Any] = []

    def load_dataset(path: str, **options: Any) -> list[dict[str, str]]:
        calls.append((path, options))
        return ROWS

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    options = {"hub_config": "main", "hub_split": "test[:5%]", "hub_revision": "abc", "streaming": True}

    assert read("org/name", **options) == ROWS
    expected = {"name": "main", "split": "test[:5%]", "revision": "abc", "streaming": True, "data_dir": None}
    assert calls == [("org/name", expected)]


def test_the_configurations_of_a_hub_data_set_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load_dataset(path: str, **options: Any) -> None:
        raise ValueError(
            "Config name is missing.\nPlease pick one among the available configs: ['main', 'socratic']\n"
            "Example of usage:\n\t`load_dataset('gsm8k', 'main')`"
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(InputError, match=r"set `hub_config` to one of 'main', 'socratic'$"):
        read("org/name")


def test_an_array_is_read_in_the_memory_of_a_few_rows(tmp_path: Path) -> None:
    import tracemalloc

    row = json.dumps({"prompt": "word " * 2000})
    with (tmp_path / "rows.json").open("w") as out:
        out.write("[" + ",\n".join([row] * 2000) + "]")
    assert (tmp_path / "rows.json").stat().st_size > 15 * CHUNK
    tracemalloc.start()
    count = sum(1 for _ in source_rows(DataSource(path=str(tmp_path / "rows.json"))))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert count == 2000
    assert peak < 6 * CHUNK


@pytest.mark.parametrize("text", ['[{"a": 1}, {"b"', "[{'a': 1}]", '[{"a": 1}'])
def test_a_damaged_array_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(InputError, match=r"rows\.json, row \d: not JSON"):
        read(tmp_path / "rows.json")


def test_damaged_compressed_files_are_errors(tmp_path: Path) -> None:
    for name in ("rows.jsonl.gz", "rows.jsonl.bz2", "rows.jsonl.xz", "rows.jsonl.zst"):
        (tmp_path / name).write_text("plain")
        with pytest.raises(InputError, match="damaged or incomplete"):
            read(tmp_path / name)


def test_a_table_row_with_too_many_values_is_unusable(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text('prompt,completion\na,b\nc,d,e\n"f\ng",h\n')
    rows = list(source_rows(DataSource(path=str(tmp_path / "rows.csv"))))

    assert [getattr(row, "fault", "") != "" for _, _, row in rows] == [False, True, False]
    assert [place.rpartition(" ")[2] for place, _, _ in rows] == ["2", "3", "5"]


def test_a_name_that_is_too_long_is_no_file() -> None:
    assert not is_local_path("a" * 5000)
    assert "no such file" in (file_fault("/" + "a" * 5000) or "")


@pytest.mark.parametrize(
    ("name", "kind"),
    [("a.JSONL", "jsonl"), ("a.json.zst", "json"), ("a.gz", None), ("org/name", None), ("x.parquet", "parquet")],
)
def test_the_format_is_told_by_the_name(name: str, kind: str | None) -> None:
    assert file_format(name) == kind


def test_a_file_whose_name_is_a_pattern_is_that_file(tmp_path: Path) -> None:
    path = tmp_path / "a[1].jsonl"
    path.write_text(LINES)

    assert expanded(str(path)) == [str(path)]
    assert read(path) == ROWS
    assert os.path.exists(path)
