"""Chains of thought and worked choices: what the judge is shown, what is clamped, and that draws stay what they are."""

import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align.constitution.constitution import Constitution
from align.constitution.loading import load_constitution
from align.constitution.principles import Principle, WorkedComparison
from align.engines.engine import ChoiceRequest, Request
from align.feedback.judge import Judge, judge_problems
from align.records import as_dicts
from align.settings.blocks import JudgeBlock
from tests.unit.feedback.engines import Engine
from tests.unit.feedback.test_judge import ASKS, CALM, TALK, TEXT, constitution

PAPER = Path(__file__).parents[4] / "shared" / "data" / "cai-paper"
WORKED = tuple(
    WorkedComparison.model_validate(
        {"prompt": f"Example {number}?", "better": f"right {number}", "worse": f"wrong {number}"}
        | ({"reasoning": f"Thought {number}: (B) is right.", "answer": "B"} if number % 2 else {})
    )
    for number in range(4)
)


def judge(
    block: dict[str, Any],
    score: Callable[[ChoiceRequest, str], float],
    answer: Callable[[Request], str] = lambda request: f"Hm {request.seed}.",
    made: Constitution | None = None,
    **options: Any,
) -> Judge:
    made = made or constitution(ASKS, CALM).model_copy(update={"comparisons": WORKED})
    return Judge(made, JudgeBlock.model_validate({"kind": "choice", **block}), Engine(answer, score), **options)


def engine_of(made: Judge) -> Engine:
    return made.kind.engine  # type: ignore[attr-defined, no-any-return]


def sure_of_tea(request: ChoiceRequest, choice: str) -> float:
    texts = [message.content for message in request.messages]
    asked = next(text for text in texts if "(A) tea" in text or "(B) tea" in text)
    return -1e-6 if ("(A) tea" in asked) == (choice == "A") else -12.0


def sure_of_right(request: ChoiceRequest, choice: str) -> float:
    return -1e-6 if f"({choice}) right" in request.messages[-1].content else -12.0


def test_the_judge_thinks_and_is_then_asked_for_the_letter() -> None:
    made = judge({"chain_of_thought": True}, sure_of_tea)
    [found] = made.compare([("q", TALK, "tea", "coffee", "")])

    thought, asked = engine_of(made).requests, engine_of(made).choices
    assert len(thought) == len(asked) == 2 * 2
    for request in asked:
        question, thinking, ask = request.messages
        assert question.content.endswith("Which response is it? Think step by step about both before you decide.")
        [own] = [each for each in thought if each.messages == (question,)]
        assert thinking.content == f"Hm {own.seed}."
        assert ask.content == "So which response is it? Answer with one letter, A or B."
    assert {row.reasoning for row in found.scores} == {f"Hm {each.seed}." for each in thought}
    assert {row.view for row in found.scores} == {"ab", "ba"}


@pytest.mark.parametrize(("given_range", "expected"), [([0.4, 0.6], 0.6), ([0.1, 0.9], 0.9)])
def test_only_after_a_chain_of_thought_are_probabilities_clamped(given_range: list[float], expected: float) -> None:
    block = {"chain_of_thought_range": given_range}
    [thought] = judge({"chain_of_thought": True, **block}, sure_of_tea).compare([("q", TALK, "tea", "coffee", "")])
    [straight] = judge(block, sure_of_tea).compare([("q", TALK, "tea", "coffee", "")])

    assert thought.p_a == pytest.approx(expected)
    assert set(thought.by_principle.values()) == {thought.p_a}
    assert straight.p_a is not None and straight.p_a > 0.999


def test_probabilities_are_clamped_before_they_are_averaged() -> None:
    def score(request: ChoiceRequest, choice: str) -> float:
        asked = request.messages[0].content
        tea = "A" if "(A) tea" in asked else "B"
        p = 0.9999 if "Ask." in asked else 0.3
        return math.log(p if choice == tea else 1 - p)

    [found] = judge({"chain_of_thought": True}, score).compare([("q", TALK, "tea", "coffee", "")])
    assert found.p_a is None and found.by_principle == pytest.approx({"asks": 0.6, "calm": 0.4})


def test_a_broken_hard_rule_is_certain_all_the_same() -> None:
    made = constitution(ASKS, {**CALM, "hard": True})
    [found] = judge({"chain_of_thought": True}, sure_of_tea, made=made).compare([("q", TALK, "coffee!", "tea", "")])
    assert found.p_a == 0.0


@pytest.mark.parametrize(
    ("block", "told"),
    [
        ({"chain_of_thought_range": [0.4, 0.7]}, "symmetric about one half"),
        ({"kind": "rule", "chain_of_thought": True}, "kind rule does not read chain_of_thought"),
        ({"kind": "contrast", "examples": 2}, "kind contrast does not read examples"),
        ({"chain_of_thought": True, "min_margin": 0.2}, "makes every verdict a tie"),
    ],
)
def test_settings_that_do_not_fit_are_told(block: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        JudgeBlock.model_validate(block)


def test_no_worked_choice_is_shown_unless_asked_for() -> None:
    made = judge({}, sure_of_tea)
    made.compare([("q", TALK, "tea", "coffee", "")])
    assert all(len(request.messages) == 1 for request in engine_of(made).choices)


def test_worked_choices_come_first_each_with_a_principle_of_its_own() -> None:
    many = constitution(*({"id": f"p{number}", "compare": f"Question {number}?"} for number in range(8)))
    made = judge({"examples": 3}, sure_of_tea, made=many.model_copy(update={"comparisons": WORKED}))
    made.compare([("q", TALK, "tea", "coffee", "")])

    asked = engine_of(made).choices
    [shown] = {request.messages[:-1] for request in asked}
    assert [message.role for message in shown] == ["user", "assistant"] * 3
    for number, (question, answer) in enumerate(zip(shown[::2], shown[1::2], strict=True)):
        assert f"({answer.content}) right {2 - number}" in question.content
    assert shown[3].content == "B", "the answer that its reasoning names, with or without it"
    drawn = [next(n for n in range(8) if f"Question {n}?" in message.content) for message in shown[::2]]
    assert len(set(drawn)) > 1
    other = judge({"examples": 3}, sure_of_tea, made=made.constitution, seed=5)
    other.compare([("q", TALK, "tea", "coffee", "")])
    assert engine_of(other).choices[0].messages[:-1] != shown


def test_with_a_chain_of_thought_worked_choices_are_those_that_reason() -> None:
    made = judge({"chain_of_thought": True, "examples": 2}, sure_of_tea)
    made.compare([("q", TALK, "tea", "coffee", "")])

    said = [message.content for message in engine_of(made).choices[0].messages[1:8:2]]
    assert said == ["Thought 3: (B) is right.", "B", "Thought 1: (B) is right.", "B"]
    assert judge_problems(made.constitution, JudgeBlock(chain_of_thought=True, examples=3)) == [
        "judge.examples: set to 3, but constitution 'test' has 2 worked `comparisons` with a `reasoning`; add some, or "
        "lower the number"
    ]


def test_a_worked_choice_is_not_shown_beside_its_own_question() -> None:
    made = judge({"examples": 4}, sure_of_right)
    made.compare([("q", WORKED[0].conversation, "right 0", "wrong 0", "")])
    shown = engine_of(made).choices[0].messages[:-1]
    assert len(shown) == 3 * 2
    assert not any("Example 0?" in message.content for message in shown)


def dice(salt: int) -> Callable[[ChoiceRequest, str], float]:
    def score(request: ChoiceRequest, choice: str) -> float:
        return -(zlib.crc32(f"{salt} {as_dicts(request.messages)} {choice}".encode()) % 9973) / 3001 - 0.01

    return score


@settings(deadline=None, max_examples=60)
@given(a=TEXT, b=TEXT, thinks=st.booleans(), examples=st.integers(0, 2), draw=st.booleans(), salt=st.integers(0, 99))
def test_exchanging_the_completions_exchanges_the_verdict_exactly(
    a: str, b: str, thinks: bool, examples: int, draw: bool, salt: int
) -> None:
    block = {"chain_of_thought": thinks, "examples": examples, "min_margin": 0.0}

    def verdict(number: str, *completions: str) -> Any:
        made = judge(block, dice(salt), draw_seed=salt if draw else None, seed=salt)
        return made.compare([("q", TALK, *completions, "")])[0]

    there, back = verdict("x", a, b), verdict("y", b, a)
    assert (there.p_a is None) == (back.p_a is None)
    if there.p_a is not None:
        assert back.p_a == 1 - there.p_a
    assert back.by_principle == {name: 1 - p for name, p in there.by_principle.items()}
    assert there.position_bias == back.position_bias


@settings(deadline=None, max_examples=60)
@given(pairs=st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99)), min_size=1, max_size=6), thinks=st.booleans())
def test_an_oracle_gives_the_same_labels_in_whichever_order_completions_come(
    pairs: list[tuple[int, int]], thinks: bool
) -> None:
    def oracle(request: ChoiceRequest, choice: str) -> float:
        text = request.messages[0].content
        first, second = (int(text.split(f"({letter}) ")[1].split("\n")[0]) for letter in "AB")
        says = "A" if first > second else "B" if second > first else choice
        return math.log(0.9 if choice == says else 0.1)

    made = judge({"chain_of_thought": thinks}, oracle)
    there = made.compare([(f"x{n}", TALK, str(a), str(b), "") for n, (a, b) in enumerate(pairs)])
    back = made.compare([(f"y{n}", TALK, str(b), str(a), "") for n, (a, b) in enumerate(pairs)])
    for (a, b), one, other in zip(pairs, there, back, strict=True):
        assert (one.p_a is None) == (a == b)
        if one.p_a is not None and other.p_a is not None:
            assert (one.p_a > 0.5) == (a > b)
            assert other.p_a == 1 - one.p_a
        assert abs(one.position_bias) < 1e-12 or a == b


@pytest.mark.parametrize("thinks", [False, True])
def test_draws_are_the_same_at_any_batch_size_and_after_any_kill(tmp_path: Path, thinks: bool) -> None:
    questions = [(f"q{number}", TALK, f"tea {number}", f"coffee {number}", "") for number in range(9)]

    def run(batch_size: int, journal: Path | None, dies_after: float = math.inf, first: int = 0) -> Any:
        sizes = {"batch_size": batch_size, "reasoning": {"batch_size": batch_size}}
        made = judge({**sizes, "chain_of_thought": thinks, "examples": 1}, dice(1), draw_seed=4, seed=4)
        engine_of(made).left = dies_after
        found = made.compare(questions[first:], journal)
        return found, [row for verdict in found for row in verdict.scores]

    whole = run(32, None)
    assert run(1, None) == run(5, None) == whole
    assert run(5, None, first=6)[0] == whole[0][6:]
    for death in (1, 7, 20):
        journal = tmp_path / f"{thinks}-{death}"
        with pytest.raises(KeyboardInterrupt):
            run(5, journal, dies_after=min(death, 17))
        assert run(5, journal) == whole


@pytest.mark.skipif(not PAPER.is_dir(), reason="the paper's files are not on this machine")
def test_the_paper_s_worked_choices_can_be_shown() -> None:
    paper = load_constitution(PAPER)
    reasoned = [each for each in paper.worked_comparisons if each.reasoning]
    assert (len(paper.worked_comparisons), [each.answer for each in reasoned]) == (11, ["B", "B", "A", "B", "A", "B"])
    assert all(each.conversation[-1].role == "user" and "[[[" not in each.better + each.worse for each in reasoned)
    made = judge({"chain_of_thought": True, "examples": 6}, sure_of_tea, made=paper, draw_seed=1)
    made.compare([("q", TALK, "tea", "coffee", "")])
    shown = engine_of(made).choices[0].messages
    assert len(shown) == 6 * 4 + 3
    assert isinstance(paper.principles[0], Principle)
