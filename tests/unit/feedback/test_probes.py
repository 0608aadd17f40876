"""Testing a judge on probes: what the report counts, and that a judge at chance is stopped."""

import math
from collections.abc import Callable

import pytest

from align.engines.engine import ChoiceRequest
from align.errors import JudgeAtChance
from align.feedback.judge import Judge
from align.feedback.probes import examine_judge, require_better_than_chance
from align.settings.blocks import JudgeBlock
from tests.unit.feedback.engines import Engine
from tests.unit.feedback.test_judge import ASKS, choice_judge, constitution, letters, rule_judge


def probes(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"n{n}", "better": "good", "worse": "bad"} for n in range(count)]


def probed(kind: str, right: Callable[[str, str], bool], count: int) -> Judge:
    def score(request: ChoiceRequest, choice: str) -> float:
        shown = request.messages[0].content
        prompt = shown.split("User: ")[1].split("\n")[0]
        says_good = right(shown.split("\n\n")[2], prompt)
        good_first = "(A) good" in shown
        return math.log(0.9 if (choice == "A") == (good_first == says_good) else 0.1)

    principles = [{"id": name, "compare": name, "probes": probes(count)} for name in ("first", "second")]
    return Judge(constitution(*principles), JudgeBlock.model_validate({"kind": kind}), Engine(score=score))


def test_a_judge_is_examined_on_each_principle_s_probes() -> None:
    report = examine_judge(probed("choice", lambda principle, prompt: principle == "first" or prompt == "n0", 10))

    assert (report.n, report.accuracy) == (20, 0.55)
    assert {name: (each.right, each.n) for name, each in report.by_principle.items()} == {
        "first": (10, 10),
        "second": (1, 10),
    }
    # Wilson's 95% interval of 11 in 20, from its formula.
    z, share, n = 1.959964, 0.55, 20
    centre, half = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    assert report.low == pytest.approx((centre - half) / (1 + z * z / n), abs=1e-5)
    assert report.high == pytest.approx((centre + half) / (1 + z * z / n), abs=1e-5)
    assert report.as_figures()["by_principle"]["second"] == {"right": 1.0, "n": 10}


def test_a_judge_whose_interval_includes_chance_stops_with_what_to_do() -> None:
    judge = probed("choice", lambda principle, prompt: principle == "first", 10)

    with pytest.raises(
        JudgeAtChance, match=r"50% of 20 probes right.*lowest: second 0/10.*`judge\.allow_chance: true`"
    ):
        require_better_than_chance(judge, examine_judge(judge))


def test_a_judge_that_is_always_wrong_stops_too() -> None:
    judge = probed("choice", lambda principle, prompt: False, 10)

    with pytest.raises(JudgeAtChance):
        require_better_than_chance(judge, examine_judge(judge))


def test_a_judge_without_probes_stops_unless_chance_is_allowed() -> None:
    judge = choice_judge(letters(lambda text: 0.5), ASKS)
    with pytest.raises(JudgeAtChance, match="has no probes"):
        require_better_than_chance(judge, examine_judge(judge))

    allowed = choice_judge(letters(lambda text: 0.5), ASKS, allow_chance=True)
    require_better_than_chance(allowed, examine_judge(allowed))


def test_a_good_judge_and_a_rule_judge_may_label() -> None:
    good = probed("choice", lambda principle, prompt: True, 2)
    require_better_than_chance(good, examine_judge(good))

    rule = rule_judge({**ASKS, "probes": [{"prompt": "x", "better": "a?", "worse": "b."}]})
    report = examine_judge(rule)
    assert (report.accuracy, report.n) == (1.0, 1)
    require_better_than_chance(rule, report)
