"""Testing a judge on human pairs: oracles of both signs, whatever comes first, and the gate."""

import math
from pathlib import Path
from typing import Any

import pytest

from align.constitution.constitution import Constitution
from align.constitution.principles import Principle
from align.engines.engine import ChoiceRequest
from align.errors import JudgeAtChance
from align.feedback.calibration import calibration_figures
from align.feedback.human_pairs import judge_pairs, require_agreement
from align.feedback.judge import Judge
from align.records import Message, PreferencePair
from align.settings.blocks import JudgeBlock
from tests.unit.feedback.engines import Engine

CONSTITUTION = Constitution(id="test", title="test", principles=(Principle(id="kind", text="Be kind."),))


def pairs(count: int) -> list[PreferencePair]:
    return [
        PreferencePair(
            id=f"pair {n}",
            prompt=(Message("user", f"Question {n}?"),),
            chosen=(Message("assistant", "good"),),
            rejected=(Message("assistant", "bad"),),
            probability=1.0,
            source="human",
        )
        for n in range(count)
    ]


def prefers(word: str, bias: float = 0.0) -> Engine:
    """An engine that gives the option with this word four times the probability of the other, and A some more."""

    def score(request: ChoiceRequest, letter: str) -> float:
        options = dict(line[1:].split(") ") for line in request.messages[0].content.split("\n\n") if line[:1] == "(")
        return math.log(0.8 if options[letter] == word else 0.2) + bias * (letter == "A")

    return Engine(score=score)


def judge(engine: Engine, **block: Any) -> Judge:
    return Judge(CONSTITUTION, JudgeBlock.model_validate({"kind": "choice", **block}), engine)


@pytest.mark.parametrize(("word", "p"), [("good", 0.8), ("bad", 0.2)])
def test_an_oracle_is_right_on_every_pair_or_wrong_on_every_one(word: str, p: float) -> None:
    found = judge_pairs(judge(prefers(word)), pairs(40))
    assert [row.p_chosen for row in found] == pytest.approx([p] * 40)
    assert 10 < sum(row.chosen_first for row in found) < 30
    assert calibration_figures(found)["accuracy"]["mean"] == round(p)


def test_a_bias_towards_a_changes_no_accuracy_and_is_told() -> None:
    figures = calibration_figures(judge_pairs(judge(prefers("good", bias=3.0)), pairs(40)))
    assert figures["accuracy"]["mean"] == 1.0
    assert figures["position_bias"] > 0.2
    assert figures["same_place"] == 1.0


@pytest.mark.parametrize("block", [{"clamp": 0.45}, {"chain_of_thought": True}])
def test_no_clamp_makes_the_same_place_seem_preferred_in_both_orders(block: dict[str, Any]) -> None:
    # The good one is preferred in either place, more so as A: 0.93 and 0.60, which both clamps make 0.55 or 0.60.
    found = judge_pairs(judge(prefers("good", bias=0.98), **block), pairs(20))
    assert found[0].position_bias > abs((found[0].p_chosen or 0.0) - 0.5)
    assert calibration_figures(found)["same_place"] == 0.0


def test_a_killed_test_of_a_judge_goes_on_from_its_journal(tmp_path: Path) -> None:
    dying = prefers("good")
    dying.left = 50
    with pytest.raises(KeyboardInterrupt):
        judge_pairs(judge(dying, batch_size=8), pairs(40), tmp_path / "journal")
    again = prefers("good")
    found = judge_pairs(judge(again, batch_size=8), pairs(40), tmp_path / "journal")
    assert len(again.choices) == 80 - 48
    assert found == judge_pairs(judge(prefers("good")), pairs(40))


def test_a_judge_not_shown_to_agree_with_people_is_stopped_unless_that_is_allowed() -> None:
    bad = judge(prefers("bad"))
    figures = calibration_figures(judge_pairs(bad, pairs(20)))
    with pytest.raises(JudgeAtChance) as told:
        require_agreement(bad, figures)
    assert "prefers what people prefer in 0% of the 20 pairs that it decided (of 20)" in str(told.value)
    assert "does not lie above chance" in str(told.value) and "judge.allow_chance: true" in str(told.value)
    require_agreement(judge(prefers("bad"), allow_chance=True), figures)

    good = judge(prefers("good"))
    right = calibration_figures(judge_pairs(good, pairs(20)))
    require_agreement(good, right)
    with pytest.raises(JudgeAtChance, match="`min_accuracy` 90%"):
        require_agreement(good, right, 0.9)


def test_too_few_pairs_show_nothing() -> None:
    good = judge(prefers("good"))
    with pytest.raises(JudgeAtChance, match="100% of the 3 pairs"):
        require_agreement(good, calibration_figures(judge_pairs(good, pairs(3))))
