"""Rows come from files of every kind, and what cannot be read is named."""

import gzip
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.config import PromptSource
from align.data.sources import is_file, merge_neighbours, parse_messages, parse_transcript, source_rows
from align.errors import InputError
from align.records import Conversation, Message


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
def test_transcripts_come_back_as_they_were_written(turns: list[tuple[str, str]]) -> None:
    text = "".join(f"\n\n{speaker}: {words}" for speaker, words in turns)

    roles = {"Human": "user", "Assistant": "assistant"}
    assert as_pairs(parse_transcript(text, "x")) == [(roles[speaker], words) for speaker, words in turns]


@pytest.mark.parametrize("text", ["", "Hello", "lead\n\nHuman: a"])
def test_what_does_not_start_with_a_turn_is_no_transcript(text: str) -> None:
    with pytest.raises(InputError, match=r"here: expected '\\n\\nHuman"):
        parse_transcript(text, "here")


def test_neighbours_of_one_speaker_become_one() -> None:
    talk = [Message("user", "a"), Message("user", "b"), Message("assistant", "c"), Message("user", "d")]

    assert as_pairs(merge_neighbours(talk)) == [("user", "a\n\nb"), ("assistant", "c"), ("user", "d")]


@pytest.mark.parametrize("value", [[], None, 3, [{"role": "user"}], ["user"], [{"role": "user", "content": None}]])
def test_what_is_no_list_of_messages_is_refused(value: object) -> None:
    with pytest.raises(InputError, match="`messages` must be a text or a list"):
        parse_messages(value, "messages", "here")


def rows(path: Path | str, limit: int | None = None) -> list[tuple[str, object]]:
    return list(source_rows(PromptSource(path=str(path), limit=limit)))


def test_rows_are_placed_by_file_and_number(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n\n{"a": 2}\n{"a": 3}\n')

    assert rows(path, limit=2) == [(f"{path}, row 1", {"a": 1}), (f"{path}, row 2", {"a": 2})]


def test_rows_after_the_limit_are_not_even_parsed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\nnot json\n')

    assert len(rows(path, limit=1)) == 1


def test_files_that_broke_off_are_told(tmp_path: Path) -> None:
    whole = gzip.compress(b'{"a": 1}\n' * 500)
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "b.jsonl.gz").write_text("plain")
    (tmp_path / "c.parquet").write_text("plain")
    (tmp_path / "d.jsonl").write_bytes(b'{"a": "\xff"}\n')

    for name, told in {"a.jsonl.gz": "not whole", "b.jsonl.gz": "not whole", "c.parquet": "not a parquet file"}.items():
        with pytest.raises(InputError, match=told):
            rows(tmp_path / name)
    with pytest.raises(InputError, match="not whole"):
        rows(tmp_path / "d.jsonl")


@pytest.mark.parametrize(
    ("path", "local"),
    [("a.jsonl", True), ("data/a.parquet", True), ("./a", True), ("/a/b", True), ("org/name", False), ("squad", False)],
)
def test_files_and_hub_datasets_are_told_apart(path: str, local: bool) -> None:
    assert is_file(path) == local


def test_a_path_may_start_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n')

    assert [row for _, row in rows("~/a.jsonl")] == [{"a": 1}]
