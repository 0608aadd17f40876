"""Shares over a whole set are counted right, and a gate closes where one is over its limit."""

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.errors import GateClosed
from align.feedback.gates import (
    FAULTS,
    CompareGatesBlock,
    FaultShare,
    ReviseGatesBlock,
    TextFaultShares,
    TextGatesBlock,
    check_gates,
)

CLOSINGS = ["Shall I go on?", "Is that clear?", "What do you think?"]


@given(st.lists(st.sampled_from(CLOSINGS), min_size=1))
def test_the_commonest_closing_sentence_is_counted_and_not_its_form(closings: list[str]) -> None:
    texts = TextFaultShares()
    for number, closing in enumerate(closings):
        texts.add(f"Answer {number}. {closing}")

    [(_, count)] = Counter(closings).most_common(1)
    share = texts.shares()["same_closing"]
    assert (share.count, share.rows) == (count, len(closings))


def test_one_ending_under_sentences_that_differ_is_counted() -> None:
    texts = TextFaultShares()
    for number in range(3):
        texts.add(f"Take {number} eggs and {number} spoons, and let me know how it goes!")
    texts.add("Let me know.")

    shares = texts.shares()
    assert shares["same_ending"].value == 0.75 and shares["same_ending"].examples == ["me know how it goes"]
    assert shares["same_closing"].value == 0.25


def test_polite_endings_of_an_unspaced_script_are_no_common_ending() -> None:
    texts = TextFaultShares()
    for text in ("窓を開けて空気を入れ替えてください", "医師に相談してください", "明日の朝まで待ってください"):
        texts.add(text + "。")

    assert texts.shares()["same_ending"].count == 1


def test_openings_emoji_and_repetition_are_counted() -> None:
    texts = TextFaultShares()
    for text in ("As an AI model, I bake.", "As an AI model, I cook.", "Bake 🍞.", "Go on and on. " * 8):
        texts.add(text)

    assert {name: share.value for name, share in texts.shares().items()} == {
        "emoji": 0.25,
        "repetition": 0.25,
        "same_closing": 0.25,
        "same_ending": 0.25,
        "same_opening": 0.5,
    }


def test_a_closed_gate_says_which_how_much_of_what_where_and_what_to_do() -> None:
    shares = {"emoji": FaultShare(30, 100, ["a 🙂", "b 🙂"]), "repetition": FaultShare(5, 100)}

    with pytest.raises(GateClosed) as told:
        check_gates("revise", ReviseGatesBlock(), shares, Path("x/revisions.jsonl"))
    text = str(told.value)
    assert "gate revise.gates.emoji is closed: 30.0% of 100 texts have emoji, and the limit is 25.0%" in text
    assert "'a 🙂'; 'b 🙂'" in text and "x/revisions.jsonl" in text and "sampling.temperature" in text
    assert "repetition" not in text, "at its limit a gate is open"
    assert told.value.exit_code == 1


def test_few_rows_or_no_limit_close_no_gate_and_few_rows_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    shares = {"emoji": FaultShare(49, 49)}

    check_gates("sft", TextGatesBlock(), shares, "x")
    told = "sft.gates: over the limit, but no gate closes with fewer than 50 rows: emoji 100.0% of 49 (limit 25.0%)\n"
    assert capsys.readouterr().out == told
    check_gates("sft", TextGatesBlock(emoji=None, min_rows=1), shares, "x")
    with pytest.raises(GateClosed):
        check_gates("sft", TextGatesBlock(min_rows=1), shares, "x")


def test_every_gate_has_words_and_a_remedy() -> None:
    limits = {*ReviseGatesBlock.model_fields, *CompareGatesBlock.model_fields} - {"benign", "min_rows"}

    assert limits == FAULTS.keys() and all(map(all, FAULTS.values()))


@pytest.mark.parametrize("name", FAULTS)
def test_every_limit_closes_its_gate(name: str) -> None:
    kind = ReviseGatesBlock if name in ReviseGatesBlock.model_fields else CompareGatesBlock

    check_gates("x", kind(**{name: 0.5}), {name: FaultShare(100, 200)}, "rows")
    with pytest.raises(GateClosed, match=f"x.gates.{name} is closed"):
        check_gates("x", kind(**{name: 0.5}), {name: FaultShare(101, 200)}, "rows")


def test_one_row_of_few_is_not_told(capsys: pytest.CaptureFixture[str]) -> None:
    check_gates("sft", TextGatesBlock(), {"emoji": FaultShare(1, 3), "same_closing": FaultShare(2, 3)}, "x")
    assert capsys.readouterr().out.endswith("fewer than 50 rows: same_closing 66.7% of 3 (limit 25.0%)\n")
