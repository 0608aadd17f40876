"""How well a reward model does on unseen pairs, by hand and against the bootstrap's own properties."""

import io
import math
from pathlib import Path

import pytest
from rich.console import Console

from align.run.artefacts import MANIFEST, Manifest, write_json
from align.training.held_out import (
    ScoredPair,
    held_out_figures,
    held_out_sheet,
    pair_accuracy,
    print_held_out,
    print_published_held_out,
)


def scored(
    margin: float, probability: float = 1.0, chosen: int = 10, rejected: int = 10, prompt: str = "p", source: str = "ai"
) -> ScoredPair:
    return ScoredPair("id", prompt, probability, margin, 0.0, chosen, rejected, source)


def test_held_out_figures_by_hand() -> None:
    pairs = [scored(math.log(3), 1.0, 10, 20), scored(-math.log(3), 0.75, 10, 5), scored(0.0, 0.5, 7, 7)]
    figures = held_out_figures(pairs, 1)
    assert figures["accuracy"]["mean"] == pytest.approx(1.5 / 3)
    assert figures["shorter_wins"]["mean"] == pytest.approx(1.5 / 3)
    assert figures["longer_wins"]["mean"] == pytest.approx(1.5 / 3)
    assert figures["brier"] == pytest.approx((0.25**2 + 0.5**2 + 0) / 3)
    # Predictions of 1/4 and 3/4 share bins: the first pair's label there is 0 and 1, the second's 3/4 and 1/4.
    assert figures["expected_calibration_error"] == pytest.approx((4 * abs((1 + 0.25) / 2 - 0.75) + 0) / 6)
    assert [each["count"] for each in figures["reliability"]] == [2, 2, 2]
    assert held_out_figures([], 1) == {"accuracy": None}


def test_a_certain_model_that_is_right_is_calibrated_and_one_that_is_wrong_is_not() -> None:
    right = held_out_figures([scored(50.0)] * 10, 1)
    wrong = held_out_figures([scored(-50.0)] * 10, 1)
    assert right["expected_calibration_error"] == pytest.approx(0, abs=1e-9)
    assert wrong["expected_calibration_error"] == pytest.approx(1, abs=1e-9)
    assert (right["brier"], wrong["brier"]) == (pytest.approx(0), pytest.approx(1))


def test_ties_count_for_a_half() -> None:
    assert pair_accuracy([scored(0.0)] * 4, [1.0, 0.0, -1.0, 0.0], 1)["mean"] == 0.5


def test_pairs_of_one_prompt_narrow_no_interval() -> None:
    """Each of 12 prompts has three pairs with the same outcome, which say no more than one pair of each."""
    one = [scored(1.0 if number % 3 else -1.0, prompt=str(number)) for number in range(12)]
    three = held_out_figures(one * 3, 1)["accuracy"]
    alone = held_out_figures(one, 1)["accuracy"]
    assert (three["mean"], three["low"], three["high"]) == (alone["mean"], alone["low"], alone["high"])
    assert (three["n"], alone["n"]) == (36, 12)


def test_the_table_has_the_model_beside_what_lengths_alone_would_say() -> None:
    pairs = [scored(1.0, 1.0, 10, 20, str(number), "ai" if number % 2 else "human") for number in range(10)] + [
        scored(-1.0, 1.0, 10, 5, "10", "human")
    ]
    sheet = held_out_sheet(held_out_figures(pairs, 1), "quickstart/a")
    assert sheet.title == "quickstart/a: 11 held-out pairs of 11 prompts"
    assert [row[:3] for row in sheet.rows] == [
        ("reward model", "11", "91%"),
        ("  on ai pairs", "5", "100%"),
        ("  on human pairs", "6", "83%"),
        ("the shorter answer", "11", "91%"),
        ("the longer answer", "11", "9%"),
    ]
    assert all(row[3].startswith("[") for row in sheet.rows)


def test_without_held_out_pairs_the_table_says_so() -> None:
    console = Console(file=io.StringIO(), width=100)
    print_held_out(held_out_figures([], 1), "r", console)
    assert console.file.getvalue() == "r: no pair was held out, so the reward model was not tested\n"


def test_the_table_is_shown_again_from_what_was_published(tmp_path: Path) -> None:
    folder = tmp_path / "quickstart/shared/reward"
    console = Console(file=io.StringIO(), width=100)
    print_published_held_out(folder, console)
    assert console.file.getvalue() == ""

    folder.mkdir(parents=True)
    figures = held_out_figures([scored(1.0, prompt=str(number)) for number in range(4)], 1)
    write_json(folder / MANIFEST, Manifest("reward", "f", {}, {}, {}, figures=figures).__dict__)
    print_published_held_out(folder, console)
    assert "quickstart/shared: 4 held-out pairs of 4 prompts" in console.file.getvalue()
