"""A file loads whole, with what it inherits, or all its faults are reported."""

from pathlib import Path

import pytest

from align.constitution.loading import load_constitution
from align.errors import FileProblems, InputError
from tests.unit.constitution.files import MINIMAL, faults, loaded, write


def test_every_fault_is_reported_at_once_with_its_line(tmp_path: Path) -> None:
    text = """\
title: 3
langauge: en
principles:
  - id: Not Kebab
    text: a
  - id: twice
    text: b
    weight: 0
  - id: twice
    text: c
    rule: {max_sentences: 2, contains: x}
  - id: half
    critique: Is it?
"""
    found = faults(tmp_path, text)

    assert "line 1  title: expected text, got 3; put it in quotes" in found
    assert "line 2  langauge: no such setting; did you mean `language`?" in found
    assert any(fault.startswith("line 4  principles[0].id:") for fault in found)
    assert "line 8  principles[1].weight: must be above 0, got 0" in found
    expected = "line 9  principles[2].id: 'twice' is already the id of the principle on line 6; ids must be unique"
    assert expected in found
    assert any(fault.startswith("line 11  principles[2].rule: needs exactly one check, got") for fault in found)
    assert "line 12  principles[3]: critique and revision go together; give both or none" in found
    assert len(found) == 7


@pytest.mark.parametrize("principles", ["", "principles: []\n"])
def test_a_constitution_without_principles_is_refused(tmp_path: Path, principles: str) -> None:
    assert any("at least one principle" in fault for fault in faults(tmp_path, f"title: x\n{principles}"))


def test_unknown_names_are_reported_with_the_nearest_name(tmp_path: Path) -> None:
    text = (
        "title: x\ntiers: [safety]\ndrop: [gone]\nprinciples:\n  - {id: kind, text: a, tier: safty}\n"
        "examples:\n  - {prompt: a, completion: b, critique: c, revision: d, principle: kid}\n"
    )

    assert faults(tmp_path, text) == [
        "line 3  drop: no inherited principle is named 'gone'; there are none",
        "line 5  kind.tier: no tier is named 'safty'; did you mean `safety`?",
        "line 7  examples[0].principle: no principle is named 'kid'; did you mean `kind`?",
    ]


def test_a_probe_must_hold_two_completions(tmp_path: Path) -> None:
    probed = MINIMAL + "    probes:\n      - {prompt: p, better: Same., worse: Same.}\n"
    assert faults(tmp_path, probed) == [
        "line 7  kind: probes[0].worse: is the same as `better`; give a completion that does not follow the principle"
    ]


def test_probes_must_agree_with_the_rule(tmp_path: Path) -> None:
    text = (
        "title: x\nprinciples:\n  - id: asks\n    text: Ask.\n    rule: {ends_with: '?'}\n    probes:\n"
        "      - prompt: Hi\n        better: Hello.\n        worse: Hello?\n"
    )

    assert faults(tmp_path, text) == [
        "line 8  asks: probes[0].better: must keep the principle's rule (ends_with '?')",
        "line 9  asks: probes[0].worse: must break the principle's rule (ends_with '?')",
    ]


PARENT = """\
title: Parent
tiers: [safety, tone]
principles:
  - {id: safe, text: Be safe., tier: safety}
  - {id: kind, text: Be kind., tier: tone}
  - {id: loud, text: Be loud., tier: tone}
examples:
  - {prompt: a, completion: b, critique: c, revision: d, principle: loud}
  - {prompt: e, completion: f, critique: g, revision: h}
"""


def test_a_child_overrides_by_id_drops_and_inherits(tmp_path: Path) -> None:
    write(tmp_path, PARENT, "parent.yaml")
    child = loaded(
        tmp_path,
        "title: Child\nextends: parent.yaml\ndrop: [loud]\nprinciples:\n"
        "  - {id: kind, text: Be kinder., tier: tone}\n  - {id: new, text: Be new.}\n",
    )

    assert [(principle.id, principle.text) for principle in child.principles] == [
        ("safe", "Be safe."),
        ("kind", "Be kinder."),
        ("new", "Be new."),
    ]
    assert child.tiers == ("safety", "tone")
    assert [example.conversation[0].content for example in child.examples] == ["e"]
    assert child.title == "Child"


def test_a_child_equals_the_same_constitution_written_out(tmp_path: Path) -> None:
    write(tmp_path, PARENT, "parent.yaml")
    child = loaded(tmp_path, "title: Parent\nextends: [parent.yaml]\n")

    assert child.digest == load_constitution(tmp_path / "parent.yaml").digest


def test_a_change_in_the_parent_changes_the_child(tmp_path: Path) -> None:
    write(tmp_path, PARENT, "parent.yaml")
    before = loaded(tmp_path, "title: Child\nextends: parent.yaml\n").digest
    write(tmp_path, PARENT.replace("Be loud.", "Be low."), "parent.yaml")

    assert load_constitution(tmp_path / "small.yaml").digest != before


def test_a_circular_extends_is_reported(tmp_path: Path) -> None:
    write(tmp_path, "title: b\nextends: small.yaml\n", "b.yaml")

    with pytest.raises(
        FileProblems, match=r"extends: is circular: small\.yaml → b\.yaml → small\.yaml; remove one of them"
    ):
        loaded(tmp_path, "title: a\nextends: b.yaml\n")


def test_a_missing_parent_is_reported_with_its_line(tmp_path: Path) -> None:
    assert faults(tmp_path, "title: a\nextends: none.yaml\n") == [
        "line 2  extends: no file none.yaml beside small.yaml; paths are relative to the constitution's own folder"
    ]


def test_a_missing_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        load_constitution(tmp_path / "none.yaml")


def test_unknown_names_and_invalid_values_are_reported_together(tmp_path: Path) -> None:
    text = "tiers: [safety]\nprinciples:\n  - {id: kind, text: a, weight: 0, tier: safty}\n"

    assert faults(tmp_path, text) == [
        "line 1  title: is missing",
        "line 3  kind.tier: no tier is named 'safty'; did you mean `safety`?",
        "line 3  principles[0].weight: must be above 0, got 0",
    ]


def test_faults_of_every_parent_are_reported_with_those_of_the_child(tmp_path: Path) -> None:
    write(tmp_path, "title: 1\nprinciples: [{id: a, text: b}]\n", "one.yaml")
    write(tmp_path, "title: two\n", "two.yaml")

    with pytest.raises(InputError) as raised:
        loaded(tmp_path, "title: x\nversion: 1.0\nextends: [one.yaml, two.yaml]\ndrop: [what]\n")
    assert [line.replace(str(tmp_path), "") for line in str(raised.value).splitlines()] == [
        "/small.yaml: 1 problem",
        "  line 2  version: expected text, got 1.0; put it in quotes",
        "/one.yaml: 1 problem",
        "  line 1  title: expected text, got 1; put it in quotes",
        "/two.yaml: 1 problem",
        "  line 1  principles: a constitution needs at least one principle",
    ]


TAGGED = """\
title: Tagged
tiers: [safety]
principles:
  - {id: safe, text: Be safe., tier: safety, tags: [harm]}
  - {id: kind, text: Be kind., tags: [tone, short]}
  - {id: loud, text: Be loud., tags: [tone, odd]}
  - {id: plain, text: Be plain.}
"""


@pytest.mark.parametrize(
    ("keys", "left"),
    [
        ("include: [tone]", ["kind", "loud"]),
        ("include: [tone, harm]", ["safe", "kind", "loud"]),
        ("exclude: [odd]", ["safe", "kind", "plain"]),
        ("include: [tone]\nexclude: [odd]", ["kind"]),
        ("include: [tone]\ndrop: [kind]", ["loud"]),
    ],
)
def test_a_child_inherits_by_tag(tmp_path: Path, keys: str, left: list[str]) -> None:
    write(tmp_path, TAGGED, "parent.yaml")
    child = loaded(tmp_path, f"title: Child\nextends: parent.yaml\n{keys}\nprinciples: [{{id: own, text: Own.}}]\n")

    assert [principle.id for principle in child.principles] == [*left, "own"]


def test_tags_select_only_among_inherited_principles(tmp_path: Path) -> None:
    write(tmp_path, TAGGED, "parent.yaml")
    own = "principles: [{id: kind, text: Be kinder., tags: [odd]}]"
    child = loaded(tmp_path, f"title: Child\nextends: parent.yaml\nexclude: [odd]\n{own}\n")

    assert child.principle("kind").text == "Be kinder."


def test_unknown_tags_are_reported_with_the_nearest_one(tmp_path: Path) -> None:
    write(tmp_path, TAGGED, "parent.yaml")

    found = faults(tmp_path, "title: x\nextends: parent.yaml\ninclude: [harm]\nexclude:\n  - tone\n  - shrot\n")
    assert found == ["line 6  exclude: no inherited tag is named 'shrot'; did you mean `short`?"]
    assert faults(tmp_path, "title: x\nprinciples: [{id: a, text: b, tags: [c]}]\ninclude: [c]\n") == [
        "line 3  include: no inherited tag is named 'c'; there are none"
    ]


def test_tags_that_leave_no_principle_are_reported(tmp_path: Path) -> None:
    write(tmp_path, TAGGED, "parent.yaml")

    assert faults(tmp_path, "title: x\nextends: parent.yaml\ninclude: [odd]\nexclude: [tone]\n") == [
        "line 3  principles: a constitution needs at least one principle"
    ]


def test_a_weight_is_changed_without_the_text(tmp_path: Path) -> None:
    write(tmp_path, TAGGED, "parent.yaml")
    child = loaded(tmp_path, "title: Tagged\nextends: parent.yaml\nweights: {loud: 2.5}\n")
    written = loaded(tmp_path, TAGGED.replace("id: loud,", "id: loud, weight: 2.5,"), "written.yaml")

    assert child.principle("loud").weight == 2.5
    assert child.digest == written.digest


def test_weights_of_principles_that_are_not_inherited_are_reported(tmp_path: Path) -> None:
    write(tmp_path, TAGGED, "parent.yaml")
    text = (
        "title: x\nextends: parent.yaml\ndrop: [loud]\nprinciples:\n  - {id: own, text: a}\n"
        "weights:\n  own: 2\n  knid: 3\n  loud: 1\n  safe: 0\n"
    )

    assert faults(tmp_path, text) == [
        "line 7  weights.own: this file defines the principle; set its `weight` there",
        "line 8  weights.knid: no inherited and kept principle is named 'knid'; did you mean `kind`?",
        "line 9  weights.loud: no inherited and kept principle is named 'loud'; the names are kind, plain, safe",
        "line 10  weights.safe: must be above 0, got 0",
    ]


def test_inherited_principles_keep_their_language(tmp_path: Path) -> None:
    write(tmp_path, MINIMAL, "parent.yaml")
    child = loaded(
        tmp_path,
        "title: 子\nlanguage: ja\nextends: parent.yaml\nprinciples:\n  - {id: own, text: 優しく。}\n"
        "  - {id: german, text: Sei freundlich., language: de}\n",
    )

    assert {each.id: each.language for each in child.principles} == {"kind": "en", "own": "ja", "german": "de"}
    own, kind = child.principle("own"), child.principle("kind")
    assert own.question == "次の原則によりよく従っている回答を選んでください。原則：優しく。"
    assert own.requests is not None and all("原則：優しく。" in request for request in own.requests)
    assert kind.question == "Choose the response that follows this principle better: Be kind."


def test_an_example_inside_a_principle_cannot_name_another(tmp_path: Path) -> None:
    text = (
        "title: x\nprinciples:\n  - id: kind\n    text: y\n"
        "    examples: [{prompt: a, completion: b, critique: c, revision: d, principle: e}]\n"
    )

    assert faults(tmp_path, text) == [
        "line 5  principles[0].examples[0].principle: no such setting; there are: prompt, completion, critique, "
        "revision, critique_request, revision_request"
    ]


def test_texts_of_spaces_alone_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text('title: "  "\nprinciples: [{id: a, text: " "}, {id: b, compare: " "}]\n')

    with pytest.raises(FileProblems, match="title: must not be empty") as raised:
        load_constitution(path)
    assert "principles[0]: needs a `text`" in str(raised.value)
    assert "principles[1].compare: must not be empty" in str(raised.value)


def test_folders_of_two_parents_are_used_once_and_must_not_share_a_file_name(tmp_path: Path) -> None:
    for folder in ("here", "sub/here"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.md").write_text(f"Of {folder}.")
    parent = "title: P\nsources: {sources}\nprinciples: [{{id: {id}, text: Be {id}.}}]\n"
    (tmp_path / "one.yaml").write_text(parent.format(sources="here", id="one"))
    (tmp_path / "sub/two.yaml").write_text(parent.format(sources="../here", id="two"))
    (tmp_path / "sub/other.yaml").write_text(parent.format(sources="here", id="other"))
    child = tmp_path / "child.yaml"
    child.write_text("title: C\nextends: [one.yaml, sub/two.yaml]\nprinciples: [{id: own, text: Be own.}]\n")

    assert load_constitution(child).principle("own").sources == (str(tmp_path / "here"),)

    child.write_text("title: C\nextends: [one.yaml, sub/other.yaml]\nprinciples: [{id: own, text: Be own.}]\n")
    with pytest.raises(FileProblems, match=r"line 2  extends: .* both hold a\.md"):
        load_constitution(child)


@pytest.mark.parametrize(("parent", "fault"), [("/dev/zero", "not a regular file"), ("x" * 5000, "no file x")])
def test_a_parent_that_is_no_file_is_refused(tmp_path, parent, fault):
    path = tmp_path / "c.yaml"
    path.write_text(f"title: x\nextends: {parent}\nprinciples:\n  - id: a\n    text: b\n")
    with pytest.raises(InputError, match=fault):
        load_constitution(path)


def test_a_device_is_no_constitution_of_the_paper(tmp_path):
    (tmp_path / "zero.json").symlink_to("/dev/zero")
    with pytest.raises(InputError, match="not a regular file"):
        load_constitution(tmp_path / "zero.json")
