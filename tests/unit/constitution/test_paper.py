"""The Constitutional AI paper's published JSON loads as a constitution, and comes back byte for byte."""

import json
from pathlib import Path

import pytest

from align.constitution.loading import load_constitution
from align.constitution.paper import (
    CRITIQUES,
    EXAMPLES,
    PROBES,
    QUESTIONS,
    framed,
)
from align.errors import InputError

PAPER = Path(__file__).parents[4] / "shared" / "data" / "cai-paper"
published = pytest.mark.skipif(not PAPER.is_dir(), reason="the paper's files are not on this machine")


@published
def test_instructions_come_back_byte_for_byte() -> None:
    constitution = load_constitution(PAPER / CRITIQUES)
    rendered = {
        principle.id: {
            "prompt": [framed("critique", principle.critique or "")],
            "edit_request": framed("revision", principle.revision or ""),
        }
        for principle in constitution.principles
    }

    assert rendered == json.loads((PAPER / CRITIQUES).read_text())
    assert len(rendered) == 16


@published
def test_questions_come_back_byte_for_byte() -> None:
    constitution = load_constitution(PAPER / QUESTIONS)

    rendered = [framed("compare", principle.compare or "") for principle in constitution.principles]
    assert rendered == json.loads((PAPER / QUESTIONS).read_text())


@published
def test_the_folder_is_one_constitution_with_both_lists_examples_and_probes() -> None:
    constitution = load_constitution(PAPER)

    revising = [principle for principle in constitution.principles if principle.requests]
    comparing = [principle for principle in constitution.principles if principle.question]
    assert (len(revising), len(comparing), len(constitution.principles)) == (16, 16, 32)
    assert constitution.id == "cai-paper"
    probes = [probe for principle in comparing for probe in principle.probes]
    assert {probe.better for probe in probes} == {
        entry["corrects"][0] for entry in json.loads((PAPER / PROBES).read_text())
    }


@published
def test_worked_examples_lose_nothing_but_the_dangling_turn() -> None:
    texts = json.loads((PAPER / EXAMPLES).read_text())
    examples = load_constitution(PAPER).examples

    assert len(examples) == len(texts) == 5
    for text, example in zip(texts, examples, strict=True):
        names = {"user": "Human", "assistant": "Assistant"}
        turns = [(names[turn.role], turn.content) for turn in example.conversation]
        turns += [
            ("Assistant", example.completion),
            ("CritiqueRequest", example.critique_request or ""),
            ("Critique", example.critique),
            ("RevisionRequest", example.revision_request or ""),
            ("Revision", example.revision),
        ]
        rendered = "".join(f"\n\n{name}: {words}" for name, words in turns)
        assert rendered == text.removesuffix("\n\nHuman:")


@published
def test_worked_examples_alone_are_not_a_constitution() -> None:
    with pytest.raises(InputError, match="contains no principles"):
        load_constitution(PAPER / EXAMPLES)


def test_files_of_the_paper_s_form_load_under_any_name(tmp_path: Path) -> None:
    path = tmp_path / "my principles.json"
    entry = {"prompt": [framed("critique", "Is it kind?")], "edit_request": framed("revision", "Be kind.")}
    path.write_text(json.dumps({"kind0": entry}))
    constitution = load_constitution(path)

    assert constitution.id == "my-principles"
    assert constitution.principle("kind0").requests == ("Is it kind?", "Be kind.")


def test_brackets_in_a_text_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "q.json"
    path.write_text(json.dumps([framed("compare", "Which is {better} {}?")]))

    assert load_constitution(path).principles[0].compare == "Which is {better} {}?"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "not in the form that the Constitutional AI paper published"),
        ('{"a": {"prompt": ["x"], "edit_request": "y"}}', "CritiqueRequest"),
        ("[]", "contains no principles"),
        (
            '{"Bad Id": {"prompt": ["\\n\\nCritiqueRequest: x\\n\\nCritique:"], "edit_request": '
            '"\\n\\nRevisionRequest: y\\n\\nRevision:"}}',
            "principles\\[0\\].id",
        ),
    ],
)
def test_other_json_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(content)

    with pytest.raises(InputError, match=message):
        load_constitution(path)


def test_a_folder_without_the_paper_s_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"a folder with {CRITIQUES}"):
        load_constitution(tmp_path)
