"""A constitution is identified by its content, and gathers its worked examples."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align.constitution.loading import load_constitution
from tests.unit.constitution.files import MINIMAL, loaded, write


def test_a_minimal_constitution_has_its_file_s_name_and_the_defaults(tmp_path: Path) -> None:
    constitution = loaded(tmp_path, MINIMAL)

    assert constitution.id == "small"
    assert constitution.key == f"small-{constitution.digest[:8]}"
    assert load_constitution(tmp_path / "small.yaml").key == constitution.key
    principle = constitution.principle("kind")
    assert (principle.weight, principle.hard, principle.applies, principle.framing) == (1.0, False, (), "neutral")


def test_comments_and_the_order_of_keys_do_not_change_the_digest(tmp_path: Path) -> None:
    other = '# why\nprinciples:\n  - text: Be kind.   # so\n    id: kind\nversion: "1.0"\ntitle: Small\n'

    assert loaded(tmp_path, other).digest == loaded(tmp_path, MINIMAL).digest


@settings(deadline=None)
@given(position=st.integers(0, 7), letter=st.sampled_from("xyz"))
def test_one_letter_of_text_changes_the_digest(
    tmp_path_factory: pytest.TempPathFactory, position: int, letter: str
) -> None:
    directory = tmp_path_factory.mktemp("digest")
    text = "Be kind."
    changed = MINIMAL.replace(text, text[:position] + letter + text[position + 1 :])

    assert loaded(directory, changed).digest != loaded(directory, MINIMAL).digest


def test_saying_the_constitution_s_language_again_changes_nothing(tmp_path: Path) -> None:
    again = MINIMAL.replace("text: Be kind.", "text: Be kind.\n    language: en")

    assert loaded(tmp_path, again).digest == loaded(tmp_path, MINIMAL).digest
    assert loaded(tmp_path, again.replace("language: en", "language: fr")).digest != loaded(tmp_path, MINIMAL).digest


def test_examples_and_comparisons_go_with_the_principle_that_they_stand_in(tmp_path: Path) -> None:
    inside = (
        "title: Parent\nprinciples:\n  - id: kind\n    text: Be kind.\n"
        "    examples: [{prompt: a, completion: b, critique: c, revision: d}]\n"
        "    comparisons: [{prompt: e, better: f, worse: g}]\n  - {id: other, text: x}\n"
        "comparisons:\n  - {prompt: h, better: i, worse: j}\n  - {prompt: k, better: l, worse: m, principle: kind}\n"
    )
    write(tmp_path, inside, "parent.yaml")
    whole = load_constitution(tmp_path / "parent.yaml")
    without = loaded(tmp_path, "title: Child\nextends: parent.yaml\ndrop: [kind]\n")

    assert [(each.completion, each.principle) for each in whole.worked_examples] == [("b", "kind")]
    assert [(each.better, each.principle) for each in whole.worked_comparisons] == [
        ("i", None),
        ("l", "kind"),
        ("f", "kind"),
    ]
    assert without.worked_examples == ()
    assert [each.better for each in without.worked_comparisons] == ["i"]
