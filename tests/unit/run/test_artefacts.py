"""Files are whole or absent, whatever happens while they are written."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from align.errors import InputError
from align.run.artefacts import (
    MANIFEST,
    PARTIAL,
    Journal,
    Manifest,
    file_digest,
    output_digests,
    partial_directory,
    publish,
    read_manifest,
    write_json,
    write_json_if_changed,
)


def manifest(**outputs: str) -> Manifest:
    return Manifest("sft", "f" * 16, {"seed": 0}, {}, outputs, counts={"rows": 3}, seconds=1.5)


def test_a_manifest_is_read_back_as_it_was_published(tmp_path: Path) -> None:
    partial = tmp_path / "partial"
    partial.mkdir()
    publish(partial, tmp_path / "sft", manifest(model="1"))
    assert read_manifest(tmp_path / "sft") == manifest(model="1")
    assert not partial.exists()


def test_a_folder_without_a_manifest_is_not_published(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) is None
    assert read_manifest(tmp_path / "gone") is None
    (tmp_path / "file").touch()
    assert read_manifest(tmp_path / "file" / "below") is None


@pytest.mark.parametrize("text", ["{", '{"stage": "sft"}', '{"colour": 1}'])
def test_a_manifest_that_cannot_be_read_is_named_with_the_remedy(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(InputError, match=f"{MANIFEST}: not a manifest of this version.*remove"):
        read_manifest(tmp_path)


def test_publishing_again_replaces_the_whole_folder(tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.txt").touch()
        publish(tmp_path / name, tmp_path / "sft", manifest())
    assert sorted(path.name for path in (tmp_path / "sft").iterdir()) == [MANIFEST, "second.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sft"], "nothing of the first is left over"


def test_the_content_digest_is_that_of_the_outputs_alone() -> None:
    assert manifest(a="1").content_digest == Manifest("ppo", "0", {}, {"x": "y"}, {"a": "1"}).content_digest
    assert manifest(a="1").content_digest != manifest(a="2").content_digest


def test_digests_are_sha256_of_files_and_of_each_file_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "model" / "deep").mkdir(parents=True)
    (tmp_path / "rows.jsonl").write_bytes(b"rows")
    (tmp_path / "model" / "deep" / "weights").write_bytes(b"weights")
    (tmp_path / "scratch").write_bytes(b"not an output")
    assert output_digests(tmp_path, ["rows.jsonl", "model"]) == {
        "rows.jsonl": hashlib.sha256(b"rows").hexdigest(),
        "model/deep/weights": hashlib.sha256(b"weights").hexdigest(),
    }
    assert file_digest(tmp_path / "rows.jsonl") == hashlib.sha256(b"rows").hexdigest()


def test_json_is_written_only_where_it_changed(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "slice.json"
    assert write_json_if_changed(path, {"b": 1, "a": "é"})
    os.utime(path, (1, 1))
    assert not write_json_if_changed(path, {"a": "é", "b": 1}), "the order of keys is no change"
    assert path.stat().st_mtime == 1
    assert write_json_if_changed(path, {"a": "é", "b": 2})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": "é", "b": 2}


def test_json_leaves_no_temporary_file(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {})
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_partial_folder_survives_and_those_of_other_recipes_go(tmp_path: Path) -> None:
    first = partial_directory(tmp_path, "sft", "1111")
    (first / "rows").touch()
    other = partial_directory(tmp_path, "reward", "1111")
    assert partial_directory(tmp_path, "sft", "1111") == first
    assert (first / "rows").exists()
    second = partial_directory(tmp_path, "sft", "2222")
    assert sorted((tmp_path / PARTIAL).iterdir()) == sorted([other, second])


def test_a_partial_folder_that_cannot_be_made_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot be created.*output"):
        partial_directory(tmp_path / "file", "sft", "1")


def test_a_journal_keeps_rows_over_processes_and_the_first_of_each_id(tmp_path: Path) -> None:
    path = tmp_path / "rows.journal"
    with Journal(path, 0) as first:
        first.append({"id": "a", "text": "from 0"})
        first.append({"id": "a", "text": "again"})
    with Journal(path, 1) as second:
        assert "a" in second
        second.append({"id": "a", "text": "from 1"})
        second.append({"id": "b", "text": "from 1"})
    with Journal(path, 0) as read:
        assert {row["id"]: row["text"] for row in read.rows.values()} == {"a": "from 0", "b": "from 1"}
    assert (tmp_path / "rows.journal.0").read_text().count("\n") == 1


def test_a_last_line_that_a_kill_cut_short_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "rows.journal"
    with Journal(path) as journal:
        journal.append({"id": "a", "text": "whole — with a dash"})
    own = tmp_path / "rows.journal.0"
    whole = own.read_bytes()
    for length in range(1, 20):
        own.write_bytes(whole + b'{"id": "b", "text": "\xe2\x80\x94"}\n'[:length])
        with Journal(path) as journal:
            assert list(journal.rows) == ["a"]
            journal.append({"id": "b", "text": "new"})
        assert [json.loads(line)["id"] for line in own.read_text().splitlines()] == ["a", "b"]
        own.write_bytes(whole)


def test_the_torn_line_of_another_process_is_left_in_its_file(tmp_path: Path) -> None:
    other = tmp_path / "rows.journal.1"
    other.write_bytes(b'{"id": "a"}\n{"id": "b')
    with Journal(tmp_path / "rows.journal", 0) as journal:
        assert list(journal.rows) == ["a"]
    assert other.read_bytes().endswith(b'{"id": "b'), "that process may be writing the line right now"


def test_a_row_is_on_disk_before_append_returns(tmp_path: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path; from align.run.artefacts import Journal\n"
        "journal = Journal(Path(sys.argv[1]))\n"
        "journal.append({'id': 'a'})\n"
        "os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "rows.journal")], check=False)
    assert (tmp_path / "rows.journal.0").read_text() == '{"id": "a"}\n'
