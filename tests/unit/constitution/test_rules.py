"""Rules hold for exactly the texts that a reader would expect."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from align.constitution.rules import CHECKS, Rule
from align.figures.sentences import count_sentences, count_words

CASES: list[tuple[dict[str, object], list[str], list[str]]] = [
    (
        {"ends_with": "?"},
        ["Is it?", "Is it?  \n", "He asked “is it?”", "Is it? **", "それは？", "Ok?)"],
        ["", "It is.", "? no"],
    ),
    ({"ends_with": "Over."}, ["It is OVER."], ["over. And out."]),
    ({"ends_with": ")"}, ["so (it is)"], ["so it is"]),
    ({"not_ends_with": "?"}, ["It is.", ""], ["Is it?", "それは？"]),
    ({"contains": "please"}, ["Please sit.", "oh PLEASE"], ["sit", ""]),
    ({"excludes": "!"}, ["Calm.", ""], ["Oh!", "わあ！", "wow❗", "what⁉"]),
    ({"max_sentences": 2}, ["", "One.", "One. Two."], ["One. Two. Three.", "一。二。三。"]),
    ({"min_sentences": 2}, ["One. Two.", "はい。いいえ。"], ["", "One."]),
    ({"max_words": 3}, ["one two three"], ["one two three four"]),
    ({"min_words": 2}, ["one two"], ["one", ""]),
    ({"matches": r"^\d+\.$"}, ["a\n12.\nb"], ["12. b"]),
    ({"excludes_regex": r"\bvery\b"}, ["every day"], ["very good"]),
]


@pytest.mark.parametrize(("written", "kept", "broken"), CASES, ids=[next(iter(case[0])) for case in CASES])
def test_rule_holds_for(written: dict[str, object], kept: list[str], broken: list[str]) -> None:
    rule = Rule.model_validate(written)

    assert [text for text in kept if not rule.holds(text)] == []
    assert [text for text in broken if rule.holds(text)] == []


def test_every_check_is_tried_above_and_written_in_the_schema() -> None:
    assert set(CHECKS) == set(Rule.model_fields) == {next(iter(written)) for written, _, _ in CASES}


@given(st.text(max_size=60), st.integers(1, 5))
def test_limits_agree_with_the_counts(text: str, limit: int) -> None:
    assert Rule(max_sentences=limit).holds(text) == (count_sentences(text) <= limit)
    assert Rule(min_sentences=limit + 1).holds(text) != Rule(max_sentences=limit).holds(text)
    assert Rule(min_words=limit + 1).holds(text) == (count_words(text) > limit)


@given(st.text(max_size=60), st.text(st.characters(categories=["L", "P"]), min_size=1, max_size=3))
def test_opposite_checks_are_opposite(text: str, part: str) -> None:
    assert Rule(contains=part).holds(text) != Rule(excludes=part).holds(text)
    assert Rule(ends_with=part).holds(text) != Rule(not_ends_with=part).holds(text)


@given(
    st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1, max_size=20), st.sampled_from("!?.,;")
)
def test_full_width_twins_change_no_verdict(text: str, mark: str) -> None:
    wide = "".join(chr(ord(character) + 0xFEE0) for character in text)

    for rule in (Rule(ends_with=mark), Rule(contains=mark), Rule(excludes=mark)):
        assert rule.holds(wide) == rule.holds(text)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({}, "exactly one check, got none"),
        ({"ends_with": "?", "max_words": 3}, "exactly one check, got ends_with, max_words"),
        ({"max_sentences": 0}, "greater than 0"),
        ({"max_sentences": True}, "true/false"),
        ({"contains": ""}, "at least 1 character"),
        ({"matches": "("}, "not a regular expression"),
        ({"endswith": "?"}, "Extra inputs"),
    ],
)
def test_a_rule_that_cannot_be_checked_is_refused(written: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Rule.model_validate(written)


def test_a_rule_reads_as_its_check() -> None:
    assert str(Rule(ends_with="?")) == "ends_with '?'"
    assert str(Rule(matches=r"\bvery\b")) == r"matches '\bvery\b'"
    assert str(Rule(contains="\n")) == r"contains '\n'"
