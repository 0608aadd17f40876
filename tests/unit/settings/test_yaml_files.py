"""YAML is read with the line of every key, and files that are no settings are refused."""

import os
from pathlib import Path

import pytest

from align.errors import FileProblems, InputError
from align.settings.yaml_files import key_name, load_yaml, parse_yaml

DOUBLED = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 60))
"""Sixty lines of aliases that would expand to more values than fit into memory."""


def test_lines_are_known_for_every_key_and_item() -> None:
    content, lines = parse_yaml("title: x\n\ninner:\n  # why\n  rate: 1\nmany:\n- rate: 1\n- {rate: 2}\n", "a.yaml")

    assert content == {"title": "x", "inner": {"rate": 1}, "many": [{"rate": 1}, {"rate": 2}]}
    assert lines.of(("inner", "rate")) == 5
    assert lines.of(("many", 1)) == 8
    assert lines.of(("many", 1, "rate")) == 8


def test_a_missing_key_has_the_line_of_the_key_that_encloses_it() -> None:
    _, lines = parse_yaml("title: x\ninner:\n  rate: 1\n", "a.yaml")

    assert lines.of(("inner", "steps")) == 2
    assert lines.of(("count",)) is None
    assert ("inner", "rate") in lines
    assert ("inner", "steps") not in lines


def test_every_duplicate_key_is_reported_with_the_line_of_the_first() -> None:
    with pytest.raises(FileProblems) as raised:
        parse_yaml("a: 1\nb: {c: 1, c: 2}\na: 3\n", "a.yaml")

    assert str(raised.value).splitlines() == [
        "a.yaml: 2 problems",
        "  line 2  b.c: duplicate key, first on line 2; keep one",
        "  line 3  a: duplicate key, first on line 1; keep one",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("# nothing\n", "is empty"),
        ("- 1\n", "line 1  must hold `key: value` settings at its top level"),
        ("a: 1\nb: [1\n", "not valid YAML"),
        ("a: &x [*x]\n", "an alias that contains itself"),
        (DOUBLED, "line 20  not valid YAML: more than 1,000,000 keys and values"),
        ("a: " + "[" * 3000 + "]" * 3000, "nested too deeply"),
        ("a: !!python/object/apply:os.getcwd []\n", "could not determine a constructor"),
        ("a: 1\nb: [2, !!float x]\n", "line 2  not valid YAML: 'x' is no float"),
        ("a: 1\nb: !!bool x\n", "line 2  not valid YAML: 'x' is no bool"),
        ("a: 1\nb: 2020-99-99\n", "line 2  not valid YAML: '2020-99-99' is no timestamp"),
    ],
)
def test_a_text_that_holds_no_settings_is_refused(text: str, message: str) -> None:
    with pytest.raises(FileProblems, match=r"^a\.yaml: 1 problem\n") as raised:
        parse_yaml(text, "a.yaml")
    assert message in str(raised.value)


def test_yes_and_no_are_text_and_scientific_notation_is_a_number() -> None:
    content, _ = parse_yaml("a: no\nb: 1e-4\nc: on\n", "a.yaml")

    assert content == {"a": "no", "b": 0.0001, "c": "on"}


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.yaml: no such file \(looked in"):
        load_yaml(tmp_path / "none.yaml")
    with pytest.raises(InputError, match="is a folder"):
        load_yaml(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"a: \xe9\n")
    with pytest.raises(InputError, match="not UTF-8"):
        load_yaml(tmp_path / "latin.yaml")


def test_keys_are_spelt_as_paths() -> None:
    assert key_name(("principles", 2, "text")) == "principles[2].text"


def test_a_device_or_a_pipe_is_refused_before_it_is_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    for path in (Path("/dev/zero"), tmp_path / "pipe.yaml"):
        with pytest.raises(InputError, match="not a regular file"):
            load_yaml(path)


def test_a_file_too_large_for_settings_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "large.yaml"
    with path.open("wb") as out:
        out.truncate(20_000_001)
    with pytest.raises(InputError, match="20,000,001 bytes, the limit is 20,000,000"):
        load_yaml(path)


def test_a_name_that_no_file_can_have_is_refused_like_any_other() -> None:
    with pytest.raises(InputError, match="name too long"):
        load_yaml(Path("x" * 5000))
