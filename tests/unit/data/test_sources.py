"""Rows are read from every kind of file, and errors name what cannot be read."""

import datetime
import gzip
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.data.conversations import merge_turns, parse_messages, parse_transcript
from align.data.paths import is_local_path
from align.data.sources import draw_rows, source_rows
from align.errors import InputError
from align.records import Conversation, Message
from align.settings.data import PromptSource


def as_pairs(conversation: Conversation) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in conversation]


def test_a_transcript_keeps_colons_and_line_breaks_inside_turns() -> None:
    text = "\n\nHuman: A: b\n\nnot a turn\nHuman: no\n\nAssistant: c: d\n\nHuman: e\n\nAssistant:"

    assert as_pairs(parse_transcript(text, "x")) == [
        ("user", "A: b\n\nnot a turn\nHuman: no"),
        ("assistant", "c: d"),
        ("user", "e"),
        ("assistant", ""),
    ]


TURN = st.text(st.characters(codec="ascii", categories=["L", "P"]), min_size=1, max_size=9)


@given(st.lists(st.tuples(st.sampled_from(["Human", "Assistant"]), TURN), min_size=1, max_size=5))
def test_transcripts_are_read_as_they_were_written(turns: list[tuple[str, str]]) -> None:
    text = "".join(f"\n\n{speaker}: {words}" for speaker, words in turns)

    roles = {"Human": "user", "Assistant": "assistant"}
    assert as_pairs(parse_transcript(text, "x")) == [(roles[speaker], words) for speaker, words in turns]


@pytest.mark.parametrize("text", ["", "Hello", "lead\n\nHuman: a"])
def test_a_text_that_does_not_start_with_a_turn_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"here: expected '\\n\\nHuman"):
        parse_transcript(text, "here")


def test_consecutive_turns_of_the_same_role_are_merged() -> None:
    talk = [Message("user", "a"), Message("user", "b"), Message("assistant", "c"), Message("user", "d")]

    assert as_pairs(merge_turns(talk)) == [("user", "a\n\nb"), ("assistant", "c"), ("user", "d")]


@pytest.mark.parametrize("value", [[], None, 3, [{"role": "user"}], ["user"], [{"role": "user", "content": None}]])
def test_anything_but_a_list_of_messages_is_refused(value: object) -> None:
    with pytest.raises(InputError, match="`messages` must be a text or a list"):
        parse_messages(value, "messages", "here")


def rows(path: Path | str, limit: int | None = None) -> list[tuple[str, Any]]:
    found = source_rows(PromptSource(path=str(path), limit=limit))
    return [(place, row) for place, _, row in found]


def test_rows_are_numbered_by_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n\n{"a": 3}\n{"a": 4}\n')

    assert rows(path) == [(f"{path}, line {number}", {"a": number}) for number in (1, 3, 4)]
    assert all(place == f"{path}, line {row['a']}" for place, row in rows(path, limit=2))


def test_rows_of_a_parquet_file_are_numbered(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist([{"a": 1}, {"a": 2}]), tmp_path / "a.parquet")

    assert [place for place, _ in rows(tmp_path / "a.parquet")] == [f"{tmp_path}/a.parquet, row {n}" for n in (1, 2)]


def test_unsupported_paths_are_refused_without_reading_them(tmp_path: Path) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "rows.docx").write_text("")

    for name, message in {"folder.jsonl": "is a folder", "pipe.jsonl": "is a pipe", "rows.docx": "this kind"}.items():
        with pytest.raises(InputError, match=f"{name}: .*{message}"):
            rows(tmp_path / name)


def test_a_limit_bounds_the_rows_in_memory() -> None:
    class Counted(dict[str, int]):
        alive = most = 0

        def __init__(self, number: int) -> None:
            super().__init__(a=number)
            Counted.alive += 1
            Counted.most = max(Counted.most, Counted.alive)

        def __del__(self) -> None:
            Counted.alive -= 1

    drawn = draw_rows(((str(number), "x", Counted(number)) for number in range(1000)), 10)

    assert len(drawn) == 10
    assert Counted.most <= 14


def test_a_limit_draws_rows_of_any_type_by_content_and_not_by_order(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = [{"day": datetime.date(2026, 1, 1) + datetime.timedelta(days=number)} for number in range(60)]
    for name, some in (("a.parquet", table), ("b.parquet", table[::-1])):
        pq.write_table(pa.Table.from_pylist(some), tmp_path / name)
    first, second = ([row for _, row in rows(tmp_path / name, limit=9)] for name in ("a.parquet", "b.parquet"))

    assert len(first) == 9
    assert first == second[::-1] != table[:9]


def test_truncated_and_damaged_files_are_errors(tmp_path: Path) -> None:
    whole = gzip.compress(b'{"a": 1}\n' * 500)
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "b.jsonl.gz").write_text("plain")
    (tmp_path / "c.parquet").write_text("plain")
    (tmp_path / "d.jsonl").write_bytes(b'{"a": "\xff"}\n')

    gzipped, parquet = "damaged or incomplete", "not a complete parquet file"
    for name, message in {"a.jsonl.gz": gzipped, "b.jsonl.gz": gzipped, "c.parquet": parquet}.items():
        with pytest.raises(InputError, match=message):
            rows(tmp_path / name)
    with pytest.raises(InputError, match=r"not UTF-8 text .*; save it as UTF-8"):
        rows(tmp_path / "d.jsonl")


@pytest.mark.parametrize(
    ("path", "local"),
    [("a.jsonl", True), ("data/a.parquet", True), ("./a", True), ("/a/b", True), ("org/name", False), ("squad", False)],
)
def test_local_files_are_distinguished_from_hub_datasets(path: str, local: bool) -> None:
    assert is_local_path(path) == local


def test_a_path_may_start_with_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n')

    assert [row for _, row in rows("~/a.jsonl")] == [{"a": 1}]
