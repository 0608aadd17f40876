"""Every fault of a settings file is reported with its line, in plain words, with the nearest valid key."""

from typing import Annotated

import pytest
from pydantic import Field, ValidationError

from align.settings.blocks import Block, Integer, LoraBlock, Positive
from align.settings.validation import nearest, problems_from
from align.settings.yaml_files import parse_yaml


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


def problems(text: str, model: type[Block] = Outer) -> list[str]:
    content, lines = parse_yaml(text, "a.yaml")
    with pytest.raises(ValidationError) as raised:
        model.model_validate(content)
    return [str(problem) for problem in problems_from(raised.value, lines, model)]


def test_every_fault_is_reported_once_with_its_line_and_remedy() -> None:
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


def test_a_file_name_in_place_of_a_source_is_reported_with_the_right_form_and_not_as_a_short_list() -> None:
    assert problems("sources: [my.jsonl]\n", Prompts) == [
        "line 1  sources[0]: expected `key: value` settings, got 'my.jsonl'; write {path: my.jsonl}"
    ]
    assert problems("sources: []\n", Prompts) == ["line 1  sources: must have at least 1, got 0"]


def test_a_number_in_place_of_text_is_reported_with_a_hint_to_quote_it() -> None:
    assert problems("title: 1.0\n") == ["line 1  title: expected text, got 1.0; put it in quotes"]


def test_an_unknown_key_without_a_near_one_lists_the_valid_keys() -> None:
    assert problems("title: x\nqwertz: 1\n") == [
        "line 2  qwertz: no such setting; there are: title, inner, many, lora, count"
    ]


def test_nearest_finds_misspellings_only() -> None:
    assert nearest("learning_rat", ["learning_rate", "schedule"]) == "learning_rate"
    assert nearest("xyz", ["learning_rate", "schedule"]) is None
