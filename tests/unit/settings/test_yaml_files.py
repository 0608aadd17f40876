"""YAML is read with the line of every key, and every fault is told with its line and the nearest right key."""

from pathlib import Path
from typing import Annotated

import pytest
from pydantic import Field, ValidationError

from align.errors import FileProblems, InputError
from align.settings.blocks import Block, Integer, LoraBlock, Positive
from align.settings.yaml_files import key_name, load_yaml, nearest, parse_yaml, problems_from


class Inner(Block):
    rate: float = Field(gt=0)
    steps: Positive = 1


class Outer(Block):
    title: str
    inner: Inner | None = None
    many: tuple[Inner, ...] = ()
    lora: LoraBlock | None = None
    count: Integer = 0


class Source(Block):
    path: str
    limit: int | None = None


class Prompts(Block):
    sources: Annotated[tuple[Source, ...], Field(min_length=1)]


DOUBLED = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 60))
"""Sixty lines of aliases that stand for more values than a memory holds."""


def problems(text: str, model: type[Block] = Outer) -> list[str]:
    content, lines = parse_yaml(text, "a.yaml")
    with pytest.raises(ValidationError) as raised:
        model.model_validate(content)
    return [str(problem) for problem in problems_from(raised.value, lines, model)]


def test_lines_are_known_for_every_key_and_item() -> None:
    content, lines = parse_yaml("title: x\n\ninner:\n  # why\n  rate: 1\nmany:\n- rate: 1\n- {rate: 2}\n", "a.yaml")

    assert content == {"title": "x", "inner": {"rate": 1}, "many": [{"rate": 1}, {"rate": 2}]}
    assert lines.of(("inner", "rate")) == 5
    assert lines.of(("many", 1)) == 8
    assert lines.of(("many", 1, "rate")) == 8


def test_a_key_that_is_not_there_has_the_line_of_what_encloses_it() -> None:
    _, lines = parse_yaml("title: x\ninner:\n  rate: 1\n", "a.yaml")

    assert lines.of(("inner", "steps")) == 2
    assert lines.of(("count",)) is None
    assert ("inner", "rate") in lines
    assert ("inner", "steps") not in lines


def test_every_fault_is_told_once_with_its_line_and_remedy() -> None:
    found = problems("titel: x\ninner:\n  rate: 0\n  stepps: 2\nmany:\n- rate: fast\n  steps: 1.5\ncount: true\n")

    assert sorted(found) == sorted(
        [
            "title: is missing",
            "line 1  titel: no such setting; did you mean `title`?",
            "line 3  inner.rate: must be above 0, got 0",
            "line 4  inner.stepps: no such setting; did you mean `steps`?",
            "line 6  many[0].rate: expected a number, got 'fast'",
            "line 7  many[0].steps: expected a whole number, got 1.5",
            "line 8  count: expected a number, got true/false",
        ]
    )


def test_the_alternatives_of_a_union_are_one_fault() -> None:
    found = problems("title: x\nlora:\n  target_modules: {q: 1}\n")

    assert found == ["line 3  lora.target_modules: expected text, got settings, or expected a list, got settings"]


def test_a_file_where_a_source_belongs_is_told_how_to_write_it_and_not_counted_as_missing() -> None:
    assert problems("sources: [my.jsonl]\n", Prompts) == [
        "line 1  sources[0]: expected `key: value` settings, got 'my.jsonl'; write {path: my.jsonl}"
    ]
    assert problems("sources: []\n", Prompts) == ["line 1  sources: must have at least 1, got 0"]


def test_a_number_where_text_belongs_is_told_to_be_quoted() -> None:
    assert problems("title: 1.0\n") == ["line 1  title: expected text, got 1.0; put it in quotes"]


def test_a_key_like_no_other_lists_those_there_are() -> None:
    assert problems("title: x\nqwertz: 1\n") == [
        "line 2  qwertz: no such setting; there are: title, inner, many, lora, count"
    ]


def test_every_duplicate_key_is_told_with_the_line_of_the_first() -> None:
    with pytest.raises(FileProblems) as raised:
        parse_yaml("a: 1\nb: {c: 1, c: 2}\na: 3\n", "a.yaml")

    assert str(raised.value).splitlines() == [
        "a.yaml: 2 problems",
        "  line 2  b.c: written twice, first on line 2; keep one",
        "  line 3  a: written twice, first on line 1; keep one",
    ]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "is empty"),
        ("# nothing\n", "is empty"),
        ("- 1\n", "line 1  must hold `key: value` settings at its top"),
        ("a: 1\nb: [1\n", "not valid YAML"),
        ("a: &x [*x]\n", "an alias that contains itself"),
        (DOUBLED, "line 20  not valid YAML: more than 1,000,000 keys and values"),
        ("a: " + "[" * 3000 + "]" * 3000, "nested too deeply"),
        ("a: !!python/object/apply:os.getcwd []\n", "could not determine a constructor"),
    ],
)
def test_what_is_no_settings_file_is_a_fault(text: str, told: str) -> None:
    with pytest.raises(FileProblems, match=r"^a\.yaml: 1 problem\n") as raised:
        parse_yaml(text, "a.yaml")
    assert told in str(raised.value)


def test_yes_and_no_are_words_and_scientific_notation_is_a_number() -> None:
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


def test_nearest_finds_misspellings_only() -> None:
    assert nearest("learning_rat", ["learning_rate", "schedule"]) == "learning_rate"
    assert nearest("xyz", ["learning_rate", "schedule"]) is None
