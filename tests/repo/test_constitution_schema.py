"""The published schema matches the code, accepts what `check` accepts, and detects faults of form."""

from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from ruamel.yaml import YAML

from align.cli.constitution_schema import constitution_schema, schema_page
from align.constitution.loading import load_constitution
from align.errors import FileProblems

FOLDER = Path(__file__).parents[2] / "constitutions"
FILES = sorted(FOLDER.glob("*.yaml"))
VALIDATOR = Draft202012Validator(constitution_schema())


def test_the_published_schema_is_up_to_date() -> None:
    published = (FOLDER / "schema.json").read_text(encoding="utf-8")
    assert published == schema_page(), "run `align constitution schema > constitutions/schema.json`"
    Draft202012Validator.check_schema(constitution_schema())


def test_every_key_is_described() -> None:
    schema = constitution_schema()
    for part in (schema, *schema["$defs"].values()):
        assert all(each.get("description") for each in part["properties"].values()), part["title"]
        assert part["additionalProperties"] is False


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_shipped_constitutions_name_the_schema_and_satisfy_it(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert text.splitlines()[0] == "# yaml-language-server: $schema=schema.json"
    assert [error.message for error in VALIDATOR.iter_errors(YAML(typ="safe").load(text))] == []


FAULTS = [
    "langauge: en",
    "title: 3",
    "version: 1.0",
    "language: deutsch!",
    "passages: 0",
    "passages: 1.5",
    "passages: true",
    "tiers: safety",
    "tiers: ['']",
    "weights: {a: 0}",
    "weights: {Not Kebab: 1}",
    "drop: [Not Kebab]",
    "principles: []",
    "principles: [{text: a}]",
    "principles: [{id: Not Kebab, text: a}]",
    "principles: [{id: a}]",
    "principles: [{id: a, text: ''}]",
    "principles: [{id: a, critique: b}]",
    "principles: [{id: a, text: b, weight: 0}]",
    "principles: [{id: a, text: b, hard: often}]",
    "principles: [{id: a, text: b, framing: odd}]",
    "principles: [{id: a, text: b, tags: tone}]",
    "principles: [{id: a, text: b, rule: {}}]",
    "principles: [{id: a, text: b, rule: {contains: x, excludes: y}}]",
    "principles: [{id: a, text: b, rule: {max_words: 0}}]",
    "principles: [{id: a, text: b, probes: [{prompt: c, better: d}]}]",
    "principles: [{id: a, text: b, comparisons: [{prompt: [], better: d, worse: e}]}]",
    "principles: [{id: a, text: b, examples: [{prompt: c, completion: d, critique: e, revision: f, principle: a}]}]",
    "examples: [{prompt: [{role: system, content: x}], completion: d, critique: e, revision: f}]",
    "sources: [3]",
    "extends: {a: b}",
]


@pytest.mark.parametrize("fault", FAULTS)
def test_both_check_and_the_schema_find_faults_of_form(tmp_path: Path, fault: str) -> None:
    whole = {"title": "title: x", "principles": "principles: [{id: a, text: b}]"}
    text = "\n".join((whole | {fault.partition(":")[0]: fault}).values())
    (tmp_path / "c.yaml").write_text(text)
    content: dict[str, Any] = YAML(typ="safe").load(text)

    assert not VALIDATOR.is_valid(content)
    with pytest.raises(FileProblems) as raised:
        load_constitution(tmp_path / "c.yaml")
    assert all(problem.line for problem in raised.value.problems)


@pytest.mark.parametrize(
    "text",
    [
        "title: x\nprinciples: [{id: a, text: b}]",
        "title: x\nextends: other.yaml\nsources: facts\nweights: {a: 2}\ninclude: [c]",
        "title: x\nprinciples: [{id: a, compare: b, comparisons: [{prompt: c, better: d, worse: e}]}]",
        "title: x\nprinciples: [{id: a, critique: b, revision: c, rule: {contains: x}, language: ja-JP}]",
    ],
)
def test_files_without_a_fault_are_accepted(text: str) -> None:
    assert VALIDATOR.is_valid(YAML(typ="safe").load(text))
