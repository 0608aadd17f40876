"""Rows, their ids, and the files that hold them."""

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.errors import InputError
from align.feedback.records import Comparison, Critique, Revision
from align.records import (
    Message,
    PreferencePair,
    Prompt,
    Row,
    Sample,
    as_conversation,
    as_dicts,
    digest,
    parse_jsonl,
    read_jsonl,
    read_rows,
    write_rows,
)

ASK = (Message("system", "Be kind."), Message("user", 'なぜ? \u2028 "so"'))
ANSWER = (Message("assistant", "Because."),)
ROWS: list[Row] = [
    Prompt("p", ASK, "rl", "benign", "file.jsonl"),
    Sample("s", "p", ASK, "Because.", "stop", "sft", seed=2**62),
    Critique("c", "p", 0, "calm", "Loud!", "It is loud.", "Calm.", "length", 3),
    Revision("r", "p", ASK, "Loud!", "Calm.", ("calm", "short"), 0.75, True, "", "sft"),
    Comparison("k", "p", ASK, "a", "b", None, {"calm": 0.5}, -0.25, "abstained"),
    PreferencePair("x", ASK, ANSWER, (Message("assistant", ""),), 0.5, "ai"),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: type(row).__name__)
def test_a_row_comes_back_from_its_file_as_it_was(tmp_path: Path, row: Row) -> None:
    path = tmp_path / "rows.jsonl"
    assert write_rows(path, [row, row]) == 2
    assert list(read_rows(path, type(row))) == [row, row]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: type(row).__name__)
def test_a_row_with_an_unknown_or_missing_key_is_an_error(row: Row) -> None:
    plain = json.loads(json.dumps(row.to_json()))
    with pytest.raises(TypeError):
        type(row).from_json({**plain, "colour": "red"})
    del plain["id"]
    with pytest.raises(TypeError):
        type(row).from_json(plain)


def test_preference_pairs_have_the_columns_that_trl_takes() -> None:
    plain = json.loads(json.dumps(ROWS[-1].to_json()))
    assert plain["prompt"][1]["role"] == "user"
    assert plain["chosen"] == [{"role": "assistant", "content": "Because."}]


def test_a_digest_is_sha256_of_the_canonical_form() -> None:
    expected = hashlib.sha256('{"a":[1,null],"é":"x"}'.encode()).hexdigest()
    assert digest({"é": "x", "a": [1, None]}, 64) == expected
    assert digest({"a": [1, None], "é": "x"}) == expected[:16]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(JSON, JSON)
def test_digests_are_equal_exactly_where_values_are(first: object, second: object) -> None:
    # JSON tells true from 1, which Python does not.
    same = json.dumps(first, sort_keys=True) == json.dumps(second, sort_keys=True)
    assert (digest(first) == digest(second)) is same


def test_conversations_convert_both_ways() -> None:
    assert as_conversation(as_dicts(ASK)) == ASK
    assert as_conversation(ASK) == ASK
    assert as_dicts(ANSWER) == [{"role": "assistant", "content": "Because."}]


def test_a_malformed_line_is_named_by_its_number() -> None:
    with pytest.raises(InputError, match=r"data\.jsonl, line 3: not JSON .* column 6.*The 2 lines before it are valid"):
        list(parse_jsonl(['{"a": 1}\n', "\n", '{"a" 1}\n'], "data.jsonl"))


def test_a_line_that_is_no_object_is_refused() -> None:
    with pytest.raises(InputError, match="line 2: expected a JSON object, found list; write one per line"):
        list(parse_jsonl(["{}", "[1]"], "data.jsonl"))


def test_blank_lines_and_line_separators_inside_texts_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": "x\u2028y"}\n\n   \n{"a": "z"}\n', encoding="utf-8")
    assert list(read_jsonl(path)) == [{"a": "x\u2028y"}, {"a": "z"}]


def test_a_missing_file_is_named_with_the_current_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.jsonl: no such file \(looked in"):
        list(read_jsonl(tmp_path / "gone.jsonl"))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="is a folder, expected a file; check the path"):
        list(read_jsonl(tmp_path))
    (tmp_path / "latin.jsonl").write_bytes(b'{"a": "\xe9"}\n')
    with pytest.raises(InputError, match=r"latin\.jsonl: not UTF-8"):
        list(read_jsonl(tmp_path / "latin.jsonl"))

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "some.jsonl").write_text("{}")
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(InputError, match=r"some\.jsonl: cannot be read \(Permission denied\)"):
        list(read_jsonl(tmp_path / "some.jsonl"))
