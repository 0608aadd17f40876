"""Constitutions load whole or with every fault named; their identity is their content."""

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align.constitution.constitution import Constitution, Principle, constitution_key, draw_principle, load_constitution
from align.errors import FileProblems, InputError

MINIMAL = """\
title: Small
version: "1.0"
principles:
  - id: kind
    text: Be kind.
"""


def write(directory: Path, text: str, name: str = "small.yaml") -> Path:
    path = directory / name
    path.write_text(text, encoding="utf-8")
    return path


def loaded(directory: Path, text: str, name: str = "small.yaml") -> Constitution:
    return load_constitution(write(directory, text, name))


def faults(directory: Path, text: str) -> list[str]:
    with pytest.raises(FileProblems) as raised:
        loaded(directory, text)
    return [str(problem) for problem in raised.value.problems]


def test_a_minimal_constitution_has_its_file_s_name_and_the_defaults(tmp_path: Path) -> None:
    constitution = loaded(tmp_path, MINIMAL)

    assert constitution.id == "small"
    assert constitution.key == f"small-{constitution.digest[:8]}"
    assert constitution_key(tmp_path / "small.yaml") == constitution.key
    principle = constitution.principle("kind")
    assert (principle.weight, principle.hard, principle.applies, principle.framing) == (1.0, False, (), "neutral")


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
    expected = "line 9  principles[2].id: 'twice' is taken by the principle on line 6; ids must be unique"
    assert expected in found
    assert any(fault.startswith("line 11  principles[2].rule: needs exactly one check, got") for fault in found)
    assert "line 12  principles[3]: critique and revision go together; give both or none" in found
    assert len(found) == 7


@pytest.mark.parametrize("principles", ["", "principles: []\n"])
def test_a_constitution_without_principles_is_refused(tmp_path: Path, principles: str) -> None:
    assert any("at least one principle" in fault for fault in faults(tmp_path, f"title: x\n{principles}"))


def test_names_that_name_nothing_are_faults_with_the_nearest_name(tmp_path: Path) -> None:
    text = (
        "title: x\ntiers: [safety]\ndrop: [gone]\nprinciples:\n  - {id: kind, text: a, tier: safty}\n"
        "examples:\n  - {prompt: a, completion: b, critique: c, revision: d, principle: kid}\n"
    )

    assert faults(tmp_path, text) == [
        "line 3  drop: 'gone' is no inherited principle; there are none",
        "line 5  kind.tier: 'safty' is no tier; did you mean `safety`?",
        "line 7  examples[0].principle: 'kid' is no principle; did you mean `kind`?",
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


def test_extending_in_a_circle_is_told(tmp_path: Path) -> None:
    write(tmp_path, "title: b\nextends: small.yaml\n", "b.yaml")

    with pytest.raises(FileProblems, match=r"goes round in a circle: small\.yaml → b\.yaml → small\.yaml"):
        loaded(tmp_path, "title: a\nextends: b.yaml\n")


def test_a_missing_parent_is_told_with_its_line(tmp_path: Path) -> None:
    assert faults(tmp_path, "title: a\nextends: none.yaml\n") == [
        "line 2  extends: no file none.yaml beside small.yaml; paths are relative to the constitution's own folder"
    ]


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        load_constitution(tmp_path / "none.yaml")


def principle(name: str, weight: float = 1.0, applies: tuple[str, ...] = ()) -> Principle:
    return Principle(id=name, text=name, weight=weight, applies=applies)


def test_draws_follow_the_weights() -> None:
    principles = [principle("a", 1), principle("b", 2), principle("c", 5)]
    drawn = Counter(str(each.id) for n in range(8000) if (each := draw_principle(principles, 7, "round", n)))

    # Standard deviation of each count is at most 45.
    assert abs(drawn["a"] - 1000) < 150
    assert abs(drawn["b"] - 2000) < 180
    assert abs(drawn["c"] - 5000) < 200


def test_draws_depend_on_seed_and_names_alone() -> None:
    principles = [principle(name) for name in "abcdefgh"]

    def draws(seed: int) -> list[Principle | None]:
        return [draw_principle(principles, seed, "x", number) for number in range(20)]

    assert draws(1) == draws(1)
    assert draws(1) != draws(2)


def test_only_principles_that_apply_are_drawn() -> None:
    principles = [principle("all"), principle("minors", applies=("minors",))]

    other = {each.id for n in range(50) if (each := draw_principle(principles, 0, n, category="weapons"))}
    theirs = {each.id for n in range(50) if (each := draw_principle(principles, 0, n, category="minors"))}
    assert other == {"all"}
    assert theirs == {"all", "minors"}
    assert draw_principle(principles[1:], 0, category="weapons") is None


def test_requests_and_question_come_from_the_text_where_they_are_not_given() -> None:
    plain = Principle(id="brief", text="Be brief.")
    comparing = Principle(id="c", compare="Choose the shorter.")

    assert plain.requests is not None and all("Be brief." in request for request in plain.requests)
    assert plain.question is not None and "Be brief." in plain.question
    assert comparing.requests is None
    assert Principle(id="r", critique="Is it?", revision="Mend it.").question is None


def test_faults_of_names_are_told_beside_those_of_values(tmp_path: Path) -> None:
    text = "tiers: [safety]\nprinciples:\n  - {id: kind, text: a, weight: 0, tier: safty}\n"

    assert faults(tmp_path, text) == [
        "line 1  title: is missing",
        "line 3  kind.tier: 'safty' is no tier; did you mean `safety`?",
        "line 3  principles[0].weight: must be above 0, got 0",
    ]


def test_faults_of_every_parent_are_told_beside_the_child_s(tmp_path: Path) -> None:
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
def test_a_child_takes_what_it_inherits_by_tag(tmp_path: Path, keys: str, left: list[str]) -> None:
    write(tmp_path, TAGGED, "parent.yaml")
    child = loaded(tmp_path, f"title: Child\nextends: parent.yaml\n{keys}\nprinciples: [{{id: own, text: Own.}}]\n")

    assert [principle.id for principle in child.principles] == [*left, "own"]


def test_tags_choose_of_what_is_inherited_alone(tmp_path: Path) -> None:
    write(tmp_path, TAGGED, "parent.yaml")
    own = "principles: [{id: kind, text: Be kinder., tags: [odd]}]"
    child = loaded(tmp_path, f"title: Child\nextends: parent.yaml\nexclude: [odd]\n{own}\n")

    assert child.principle("kind").text == "Be kinder."


def test_tags_that_nothing_has_are_told_with_the_nearest_one(tmp_path: Path) -> None:
    write(tmp_path, TAGGED, "parent.yaml")

    told = faults(tmp_path, "title: x\nextends: parent.yaml\ninclude: [harm]\nexclude:\n  - tone\n  - shrot\n")
    assert told == ["line 6  exclude: 'shrot' is no inherited tag; did you mean `short`?"]
    assert faults(tmp_path, "title: x\nprinciples: [{id: a, text: b, tags: [c]}]\ninclude: [c]\n") == [
        "line 3  include: 'c' is no inherited tag; there are none"
    ]


def test_tags_that_leave_nothing_are_told(tmp_path: Path) -> None:
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


def test_weights_of_what_is_not_inherited_are_told(tmp_path: Path) -> None:
    write(tmp_path, TAGGED, "parent.yaml")
    text = (
        "title: x\nextends: parent.yaml\ndrop: [loud]\nprinciples:\n  - {id: own, text: a}\n"
        "weights:\n  own: 2\n  knid: 3\n  loud: 1\n  safe: 0\n"
    )

    assert faults(tmp_path, text) == [
        "line 7  weights.own: is a principle of this file; write its `weight` there",
        "line 8  weights.knid: 'knid' is no inherited principle that is kept; did you mean `kind`?",
        "line 9  weights.loud: 'loud' is no inherited principle that is kept; there are kind, plain, safe",
        "line 10  weights.safe: must be above 0, got 0",
    ]


def test_what_is_inherited_keeps_its_language(tmp_path: Path) -> None:
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


def test_an_example_inside_a_principle_names_no_other(tmp_path: Path) -> None:
    text = (
        "title: x\nprinciples:\n  - id: kind\n    text: y\n"
        "    examples: [{prompt: a, completion: b, critique: c, revision: d, principle: e}]\n"
    )

    assert faults(tmp_path, text) == [
        "line 5  principles[0].examples[0].principle: no such setting; there are: prompt, completion, critique, "
        "revision, critique_request, revision_request"
    ]


def test_texts_of_spaces_alone_say_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text('title: "  "\nprinciples: [{id: a, text: " "}, {id: b, compare: " "}]\n')

    with pytest.raises(FileProblems, match="title: must not be empty") as raised:
        load_constitution(path)
    assert "principles[0]: needs a `text`" in str(raised.value)
    assert "principles[1].compare: must not be empty" in str(raised.value)


def test_folders_of_two_parents_are_shown_once_and_must_not_hold_one_name(tmp_path: Path) -> None:
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
