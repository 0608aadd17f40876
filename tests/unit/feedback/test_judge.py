"""Judges: exact under exchange, and tiers and hard principles decide in order."""

import math
import zlib
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align.constitution.constitution import Constitution
from align.constitution.principles import Principle
from align.engines.engine import ChoiceRequest
from align.errors import InputError
from align.feedback.judge import (
    ABSTAINED,
    BOTH_BREAK,
    NO_PRINCIPLE,
    TIE,
    Judge,
    Verdict,
    judge_problems,
)
from align.records import Message, as_conversation
from align.settings.blocks import JudgeBlock
from tests.unit.feedback.engines import Engine

TALK = as_conversation([{"role": "user", "content": "Hello?"}])


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def constitution(*principles: dict[str, Any], tiers: tuple[str, ...] = ()) -> Constitution:
    made = tuple(Principle.model_validate({"text": each["id"], **each}) for each in principles)
    return Constitution(id="test", title="test", principles=made, tiers=tiers)


ASKS = {"id": "asks", "text": "Ask.", "opposite": "Tell.", "rule": {"ends_with": "?"}}
CALM = {"id": "calm", "text": "Be calm.", "opposite": "Be wild.", "rule": {"excludes": "!"}}
SHORT = {"id": "short", "text": "Be short.", "opposite": "Be long.", "rule": {"max_sentences": 1}}


def rule_judge(*principles: dict[str, Any], tiers: tuple[str, ...] = (), **block: object) -> Judge:
    return Judge(constitution(*principles, tiers=tiers), JudgeBlock.model_validate({"kind": "rule", **block}))


def verdict(judge: Judge, a: str, b: str, category: str = "") -> Verdict:
    return judge.compare([("q", TALK, a, b, category)])[0]


def test_rule_probability_follows_the_weighted_share_of_rules_kept() -> None:
    judge = rule_judge(ASKS, {**CALM, "weight": 3}, scale=4)

    found = verdict(judge, "Calm.", "Wild!")
    # A keeps rules of weight 3 of 4 and B none: sigmoid(4 * (3/4 - 0)).
    assert found.p_a == pytest.approx(sigmoid(3))
    assert found.by_principle == {"asks": 0.5, "calm": pytest.approx(sigmoid(4))}
    assert found.position_bias == 0


def test_as_many_rules_kept_is_a_tie() -> None:
    found = verdict(rule_judge(ASKS, CALM), "Wild?!  Yes?", "Calm.")

    assert verdict(rule_judge(ASKS), "One.", "Two.").reason == TIE
    assert found == Verdict(None, {"asks": pytest.approx(sigmoid(4)), "calm": pytest.approx(sigmoid(-4))}, 0.0, TIE)


def test_the_first_tier_that_tells_the_two_apart_decides() -> None:
    first, second = {**ASKS, "tier": "first"}, {**CALM, "tier": "second"}
    judge = rule_judge(second, first, tiers=("first", "second"))

    assert verdict(judge, "Wild!?", "Calm.").p_a == pytest.approx(sigmoid(4))
    assert verdict(judge, "Wild!", "Calm.").p_a == pytest.approx(sigmoid(-4))


def test_principles_without_a_tier_come_last() -> None:
    judge = rule_judge(CALM, {**ASKS, "tier": "first"}, tiers=("first",))

    assert verdict(judge, "Wild!?", "Calm.").p_a == pytest.approx(sigmoid(4))


def test_who_breaks_a_hard_rule_loses_whatever_else_it_keeps() -> None:
    judge = rule_judge({**ASKS, "weight": 99}, {**CALM, "hard": True})

    assert verdict(judge, "Wild!?", "Calm.").p_a == 0.0
    assert verdict(judge, "Wild!?", "Wild!").reason == f"{BOTH_BREAK} (calm)"
    assert verdict(judge, "Calm?", "Calm.").p_a == pytest.approx(sigmoid(4))


def test_a_verdict_names_the_principles_that_decided_and_no_others() -> None:
    tiered = rule_judge({**ASKS, "tier": "first"}, CALM, SHORT, {**CALM, "id": "hard", "hard": True}, tiers=("first",))

    assert verdict(tiered, "Wild!?", "Calm.").decided_by == ("hard",)
    assert verdict(tiered, "Wild!", "Wild!?").decided_by == (), "both are broken, and nothing was decided"
    assert verdict(tiered, "Calm?", "Calm.").decided_by == ("asks",)
    assert verdict(tiered, "One.", "One. Two.").decided_by == ("calm", "short")
    assert verdict(tiered, "One.", "Two.").decided_by == ()


def test_a_hard_rule_decides_by_its_own_name_though_the_judge_asks_no_model_about_it() -> None:
    hard = {"id": "hard", "rule": {"excludes": "!"}, "hard": True, "text": "Calm."}
    judge = contrast_judge(lambda request, choice: -1.0, ASKS, hard)

    found = verdict(judge, "Wild!", "Calm.")
    assert (found.p_a, found.by_principle, found.decided_by) == (0.0, {"asks": 0.5}, ("hard",))


def test_principles_apply_to_their_categories_alone() -> None:
    judge = rule_judge({**ASKS, "applies": ["talk"]}, {**CALM, "applies": ["calls"], "hard": True})

    assert verdict(judge, "Wild!?", "Calm.", "talk").p_a == pytest.approx(sigmoid(4))
    assert verdict(judge, "Wild!?", "Calm.", "calls").p_a == 0.0
    assert verdict(judge, "Wild!?", "Calm.", "other") == Verdict(None, {}, 0.0, NO_PRINCIPLE)


def test_clamped_probabilities_stay_inside() -> None:
    judge = rule_judge({**CALM, "hard": True}, clamp=0.4)

    assert verdict(judge, "Wild!", "Calm.").p_a == pytest.approx(0.4)


def contrast_judge(score: Callable[[ChoiceRequest, str], float], *principles: dict[str, Any], **block: object) -> Judge:
    settings = JudgeBlock.model_validate({"kind": "contrast", **block})
    return Judge(constitution(*principles), settings, Engine(score=score))


def test_contrast_is_the_mean_token_log_ratio_of_principle_and_opposite() -> None:
    # Two-word A: -1 and -3 nats in all; four-word B: -8 and -4.
    table = {("Ask.", "a a"): -1.0, ("Tell.", "a a"): -3.0, ("Ask.", "b b b b"): -8.0, ("Tell.", "b b b b"): -4.0}
    judge = contrast_judge(lambda request, choice: table[request.messages[0].content, choice], ASKS, scale=2)

    found = verdict(judge, "a a", "b b b b")
    # Contrast of A is (-1 + 3)/2 = 1 nat a token, of B (-8 + 4)/4 = -1.
    assert found.p_a == pytest.approx(sigmoid(2 * 2))
    assert found.by_principle == {"asks": found.p_a}


def test_contrast_puts_the_principle_before_a_system_message_that_is_there() -> None:
    judge = contrast_judge(lambda request, choice: 0.0, ASKS)
    talk = (Message("system", "You are terse."), *TALK)
    judge.compare([("q", talk, "a", "b", "")])

    engine = judge.kind.engine  # type: ignore[attr-defined]
    systems = {request.messages[0].content for request in engine.choices}
    assert systems == {"Ask.\n\nYou are terse.", "Tell.\n\nYou are terse."}
    assert all(request.messages[1:] == TALK for request in engine.choices)


def test_contrast_scores_a_completion_once_however_often_it_is_compared() -> None:
    judge = contrast_judge(lambda request, choice: -1.0, ASKS)
    judge.compare([("q1", TALK, "a", "b", ""), ("q2", TALK, "a", "c", ""), ("q3", TALK, "b", "a", "")])

    engine = judge.kind.engine  # type: ignore[attr-defined]
    assert len(engine.choices) == 3 * 2


def test_a_completion_that_cannot_be_scored_is_abstained_from() -> None:
    judge = contrast_judge(lambda request, choice: -math.inf, ASKS)

    assert verdict(judge, "a", "b") == Verdict(None, {}, 0.0, ABSTAINED)


def choice_judge(score: Callable[[ChoiceRequest, str], float], *principles: dict[str, Any], **block: object) -> Judge:
    return Judge(constitution(*principles), JudgeBlock.model_validate({"kind": "choice", **block}), Engine(score=score))


def letters(first: Callable[[str], float]) -> Callable[[ChoiceRequest, str], float]:
    """Log-probabilities of A and B where `first(text)` is the probability of A; half the mass is elsewhere."""

    def score(request: ChoiceRequest, choice: str) -> float:
        p = first(request.messages[0].content)
        return math.log(0.5 * (p if choice == "A" else 1 - p))

    return score


def test_choice_averages_both_orders_of_normalised_probabilities() -> None:
    # Shown A first: P(A) = 0.9; shown B first: P(A) = 0.6, so that B in first place has 0.6 and A has 0.4.
    judge = choice_judge(letters(lambda text: 0.9 if "(A) tea" in text else 0.6), ASKS)

    found = verdict(judge, "tea", "coffee")
    assert found.p_a == pytest.approx((0.9 + 0.4) / 2)
    assert found.position_bias == pytest.approx((0.9 + 0.6) / 2 - 0.5)


def test_a_judge_that_only_looks_at_the_place_finds_a_tie() -> None:
    found = verdict(choice_judge(letters(lambda text: 0.95), ASKS), "tea", "coffee")

    assert found.p_a is None
    assert found.reason == TIE
    assert found.position_bias == pytest.approx(0.45)


def test_choice_shows_the_whole_conversation_the_question_and_both_completions() -> None:
    judge = choice_judge(letters(lambda text: 0.5), {"id": "brief", "compare": "Choose the shorter."})
    system = Message("system", "Be a waiter.")
    talk = (system, *TALK, Message("assistant", "Yes?"), Message("user", "Tea or coffee?"))
    judge.compare([("q", talk, "Tea {}.", "Coffee %s.", "")])

    asked = [request.messages[0].content for request in judge.kind.engine.choices]  # type: ignore[attr-defined]
    [shown] = [text for text in asked if "(A) Tea" in text]
    parts = [
        "System: Be a waiter.",
        "User: Hello?",
        "Assistant: Yes?",
        "User: Tea or coffee?",
        "Choose the shorter.",
        "(A) Tea {}.",
        "(B) Coffee %s.",
        "A or B",
    ]
    assert [shown.index(part) for part in parts] == sorted(shown.index(part) for part in parts)


def test_choice_abstains_where_neither_letter_was_likely() -> None:
    judge = choice_judge(lambda request, choice: -9.0 if choice == "A" else -12.0, ASKS)

    assert verdict(judge, "tea", "coffee") == Verdict(None, {}, 0.0, ABSTAINED)


def test_a_letter_that_the_server_did_not_show_has_no_probability() -> None:
    def score(request: ChoiceRequest, choice: str) -> float:
        says_a = "(A) tea" in request.messages[0].content
        return 0.0 if (choice == "A") == says_a else -math.inf

    assert verdict(choice_judge(score, ASKS), "tea", "coffee").p_a == 1.0


def test_choice_speaks_the_constitution_s_language() -> None:
    engine = Engine(score=letters(lambda text: 0.5))
    made = constitution(ASKS).model_copy(update={"language": "ja"})
    Judge(made, JudgeBlock(), engine).compare([("q", TALK, "a", "b", "")])

    assert "ユーザー: Hello?" in engine.choices[0].messages[0].content


TEXT = st.text(st.characters(codec="ascii", categories=["L", "P", "Zs"]), min_size=1, max_size=12)


@settings(deadline=None)
@given(
    a=TEXT, b=TEXT, kind=st.sampled_from(["choice", "contrast", "rule"]), draw=st.booleans(), salt=st.integers(0, 99)
)
def test_exchanging_the_completions_exchanges_the_verdict_exactly(
    a: str, b: str, kind: str, draw: bool, salt: int
) -> None:
    def score(request: ChoiceRequest, choice: str) -> float:
        return -(zlib.crc32(f"{salt} {request.messages[0].content} {choice}".encode()) % 9973) / 3001 - 0.01

    def judge() -> Judge:
        block = JudgeBlock.model_validate({"kind": kind, "scale": 0.7})
        made = constitution(ASKS, {**CALM, "weight": 0.3}, {**SHORT, "hard": True})
        engine = None if kind == "rule" else Engine(score=score)
        return Judge(made, block, engine, draw_seed=salt if draw else None)

    there, back = verdict(judge(), a, b), verdict(judge(), b, a)
    assert there.position_bias == back.position_bias
    assert there.reason == back.reason
    if there.p_a is None:
        assert back.p_a is None
    else:
        assert back.p_a == 1 - there.p_a
    assert back.by_principle == {name: 1 - p for name, p in there.by_principle.items()}


@pytest.mark.parametrize("kind", ["choice", "contrast"])
def test_an_oracle_is_believed_in_either_order(kind: str) -> None:
    def score(request: ChoiceRequest, choice: str) -> float:
        if kind == "choice":
            text = request.messages[0].content
            return -0.1 if ("(A) good" in text) == (choice == "A") else -3.0
        return -1.0 if (request.messages[0].content == "Ask.") == (choice == "good") else -2.0

    judge = Judge(constitution(ASKS), JudgeBlock.model_validate({"kind": kind}), Engine(score=score))
    right, wrong = judge.compare([("x", TALK, "good", "bad", ""), ("y", TALK, "bad", "good", "")])

    assert right.p_a is not None and right.p_a > 0.9
    assert wrong.p_a == 1 - right.p_a


def test_one_principle_is_drawn_for_each_question() -> None:
    many = [{"id": f"p{n}", "rule": {"ends_with": "?"}} for n in range(4)]
    judge = Judge(constitution(*many), JudgeBlock(kind="rule"), draw_seed=3)
    questions = [(f"q{n}", TALK, "a?", "b", "") for n in range(40)]

    drawn = [list(each.by_principle) for each in judge.compare(questions)]
    assert all(len(names) == 1 for names in drawn)
    assert {name for names in drawn for name in names} == {"p0", "p1", "p2", "p3"}
    assert [list(each.by_principle) for each in judge.compare(questions[5:6])] == drawn[5:6]


@pytest.mark.parametrize(
    ("kind", "lacks"),
    [("rule", "a `rule`"), ("contrast", "a `text` and an `opposite`"), ("choice", "a `compare` or a `text`")],
)
def test_a_constitution_without_what_the_judge_needs_is_refused(kind: str, lacks: str) -> None:
    made = constitution({"id": "x", "text": "", "critique": "c", "revision": "r"})
    block = JudgeBlock.model_validate({"kind": kind})

    [problem] = judge_problems(made, block)
    assert problem.startswith(f"judge.kind: '{kind}' needs a principle with {lacks}, and constitution 'test' has none")
    with pytest.raises(InputError):
        Judge(made, block, Engine())


def by_question(**probabilities: float) -> Callable[[ChoiceRequest, str], float]:
    """The judge's probability that "good" is better than "bad", by a word of the principle's question."""

    def first(text: str) -> float:
        p = next(p for word, p in probabilities.items() if f"{word}-question" in text)
        return p if text.index("good") < text.index("bad") else 1 - p

    return letters(first)


HARD = {"id": "safe", "compare": "safe-question", "hard": True}
SOFT = {"id": "kind", "compare": "kind-question", "weight": 3}


@pytest.mark.parametrize(
    ("hard", "p", "decided_by"),
    [
        (0.9, 0.9, ("safe",)),  # 0.4 from one half, beyond the margin of 0.25
        (0.6, 0.3, ("safe", "kind")),  # unclear: (0.6 + 3 * 0.2) / 4
        (0.05, 0.05, ("safe",)),
    ],
)
def test_a_hard_principle_decides_alone_only_where_its_opinion_is_clear(
    hard: float, p: float, decided_by: tuple[str, ...]
) -> None:
    judge = choice_judge(by_question(safe=hard, kind=0.2), HARD, SOFT)
    found = verdict(judge, "good", "bad")
    assert (found.p_a, found.decided_by) == (pytest.approx(p), decided_by)
    assert verdict(judge, "bad", "good").p_a == pytest.approx(1 - p)


def test_a_hard_rule_that_both_keep_leaves_the_decision_to_the_others() -> None:
    ruled = {**HARD, "rule": {"excludes": "!"}}
    found = verdict(choice_judge(by_question(safe=0.6, kind=0.2), ruled, SOFT), "good", "bad")
    assert (found.p_a, found.decided_by) == (pytest.approx(0.2), ("kind",))


def test_the_margin_of_hard_principles_is_a_setting_and_is_read_before_the_clamp_of_a_chain_of_thought() -> None:
    score = by_question(safe=0.6, kind=0.2)
    found = verdict(choice_judge(score, HARD, SOFT, hard_margin=0.05), "good", "bad")
    assert found.decided_by == ("safe",)
    clamped = choice_judge(by_question(safe=0.9, kind=0.2), HARD, SOFT, chain_of_thought=True)
    found = verdict(clamped, "good", "bad")
    assert (found.p_a, found.decided_by) == (pytest.approx(0.6), ("safe",))
