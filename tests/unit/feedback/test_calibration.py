"""Calibration of a judge's labels, by hand, by brute force and against torch."""

import io
import math
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from align.feedback.calibration import (
    JudgedPair,
    calibration_figures,
    calibration_slope,
    equal_mass_edges,
    error_if_calibrated,
    print_calibration,
)
from align.figures.statistics import wilson_interval


def judged(p: float | None, number: int = 0, label: float = 1.0, **others: Any) -> JudgedPair:
    given = {"chosen_first": number % 2 == 0, "chosen_characters": 10, "rejected_characters": 20, **others}
    return JudgedPair(id=str(number), prompt_id=str(number), label=label, p_chosen=p, **given)


def numbered(probabilities: list[float | None], **others: Any) -> list[JudgedPair]:
    return [judged(p, number, **others) for number, p in enumerate(probabilities)]


def test_figures_by_hand() -> None:
    pairs = [*numbered([0.8, 0.9, 0.3]), judged(None, 3, reason="tie", chosen_characters=20)]
    figures = calibration_figures(pairs)
    assert (figures["pairs"], figures["prompts"], figures["decided"], figures["undecided"]) == (4, 4, 3, {"tie": 1})
    assert figures["accuracy"]["mean"] == pytest.approx(2 / 3)
    assert (figures["accuracy"]["low"], figures["accuracy"]["high"]) == pytest.approx(wilson_interval(2, 3))
    assert figures["accuracy_undecided_half"]["mean"] == pytest.approx(2.5 / 4)
    baselines = {name: found["mean"] for name, found in figures["baselines"].items()}
    assert baselines == {"first": 0.5, "shorter": 3.5 / 4, "longer": 0.5 / 4}
    assert figures["brier"] == pytest.approx((0.2**2 + 0.1**2 + 0.7**2) / 3)
    assert figures["log_loss"] == pytest.approx(-(math.log(0.8) + math.log(0.9) + math.log(0.3)) / 3)
    # Confidences 0.7 (people disagree), 0.8 and 0.9 (they agree), each in a bin of its own.
    assert figures["expected_calibration_error"] == pytest.approx((0.7 + 0.2 + 0.1) / 3)
    assert figures["mean_confidence"] == pytest.approx(0.8)


def test_the_losses_are_torch_s_over_the_chosen_side() -> None:
    import torch

    drawn = np.random.default_rng(1)
    p, labels = drawn.uniform(0.01, 0.99, 60), drawn.uniform(0.5, 1, 60)
    figures = calibration_figures([judged(a, n, b) for n, (a, b) in enumerate(zip(p, labels, strict=True))])
    given, wanted = torch.tensor(p), torch.tensor(labels)
    entropy = torch.nn.functional.binary_cross_entropy(given, wanted)
    assert figures["log_loss"] == pytest.approx(float(entropy))
    assert figures["brier"] == pytest.approx(float(torch.nn.functional.mse_loss(given, wanted)))


def test_nothing_but_the_baseline_of_the_first_place_depends_on_which_completion_is_a() -> None:
    pairs = numbered([0.8, 0.6, 0.3, 0.55])
    swapped = [judged(pair.p_chosen, n, chosen_first=not pair.chosen_first) for n, pair in enumerate(pairs)]
    one, other = calibration_figures(pairs), calibration_figures(swapped)
    assert one.pop("baselines")["first"]["mean"] == 1 - other.pop("baselines")["first"]["mean"]
    assert one == other


def test_the_slope_of_labels_made_too_sure_by_a_factor_is_its_inverse() -> None:
    drawn = np.random.default_rng(0)
    odds = drawn.normal(0, 2, 20_000)
    happened = drawn.random(20_000) < 1 / (1 + np.exp(-odds))
    for factor in (1.0, 4.0):
        slope = calibration_slope(1 / (1 + np.exp(-factor * odds)), happened)
        assert slope is not None
        assert slope.mean == pytest.approx(1 / factor, rel=0.05)
        assert slope.low < 1 / factor < slope.high


def test_the_slope_is_the_minimum_of_the_log_loss_found_on_a_grid() -> None:
    p, happened = np.array([0.6, 0.7, 0.8, 0.9, 0.95]), np.array([1, 0, 1, 1, 0])
    slope = calibration_slope(p, happened)
    grid = np.linspace(-3, 3, 6001)
    odds = np.log(p / (1 - p))
    losses = [(np.logaddexp(0, -b * odds) * happened + np.logaddexp(0, b * odds) * (1 - happened)).sum() for b in grid]
    assert slope is not None and slope.mean == pytest.approx(grid[int(np.argmin(losses))], abs=2e-3)
    # The Wald interval's width from the curvature of that loss.
    step = 1e-3
    middle = int(np.argmin(losses))
    curvature = (losses[middle + 1] - 2 * losses[middle] + losses[middle - 1]) / step**2
    assert slope.high - slope.low == pytest.approx(2 * 1.96 / math.sqrt(curvature), rel=1e-2)


def test_labels_without_a_fault_and_labels_without_an_odds_have_no_slope() -> None:
    assert calibration_slope([0.6, 0.9], [1, 1]) is None
    assert calibration_slope([0.6, 0.9], [0, 0]) is None
    assert calibration_slope([0.5, 0.5], [0, 1]) is None


def test_the_error_of_calibrated_labels_falls_with_the_root_of_their_number() -> None:
    few, many = error_if_calibrated([0.75] * 100), error_if_calibrated([0.75] * 1600)
    # The mean absolute deviation of a share of 0.75 in 100: sqrt(2/pi) * sqrt(0.75 * 0.25 / 100).
    assert few == pytest.approx(math.sqrt(2 / math.pi * 0.75 * 0.25 / 100), rel=0.15)
    assert few / many == pytest.approx(4, rel=0.25)


def test_bins_of_equal_mass_hold_as_many_pairs_each_and_one_bin_where_all_are_alike() -> None:
    assert equal_mass_edges([0.5, 0.6, 0.7, 0.8, 0.9], 2) == pytest.approx([0.5, 0.7, 0.9])
    assert equal_mass_edges([0.7] * 9, 5) == [0.0, 1.0]
    figures = calibration_figures(numbered([0.51 + 0.0049 * n for n in range(100)]))
    assert sum(each["count"] for each in figures["reliability"]) == 100
    assert all(each["count"] in (19, 20, 21) for each in figures["reliability"])
    alike = calibration_figures(numbered([0.98] * 30 + [0.02] * 10))
    [one] = alike["reliability"]
    assert (one["count"], one["share"]) == (40, 0.75)


def test_each_principle_is_counted_on_the_pairs_that_it_tells_apart() -> None:
    opinions = [{"a": 0.9, "b": 0.5}, {"a": 0.2, "b": 0.505}, {"a": 0.7}]
    pairs = [judged(0.6, n, p_by_principle=each) for n, each in enumerate(opinions)]
    found = calibration_figures(pairs, margin=0.02)["by_principle"]
    assert (found["a"]["asked"], found["a"]["n"], found["a"]["mean"]) == (3, 3, pytest.approx(2 / 3))
    assert (found["b"]["asked"], found["b"]["n"], found["b"]["low"], found["b"]["high"]) == (2, 0, 0.0, 1.0)


def test_a_judge_that_looks_at_the_place_alone_is_seen() -> None:
    fixed = [judged(0.52, n, p_by_principle={"a": 0.52}, position_bias=0.4, same_place=True) for n in range(3)]
    free = judged(0.9, 3, p_by_principle={"a": 0.9}, position_bias=-0.1)
    figures = calibration_figures([*fixed, free])
    assert figures["same_place"] == 0.75
    assert figures["position_bias"] == pytest.approx((3 * 0.4 - 0.1) / 4)


def test_the_tables_say_what_the_figures_say() -> None:
    console = Console(file=io.StringIO(), width=120)
    pairs = [judged(p, n, p_by_principle={"a": p, "b": p}) for n, p in enumerate([0.8, 0.9, 0.3])]
    print_calibration(calibration_figures([*pairs, judged(None, 3, reason="tie")]), "quickstart/a", console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    for part in (
        "quickstart/a: 4 pairs of 4 prompts",
        "undecided: tie 1",
        "the shorter answer",
        "always A",
        "Brier score 0.180",
        "each principle by itself",
        "Slope of the log-odds",
    ):
        assert part in shown
    print_calibration(calibration_figures([judged(None, 0, reason="tie")]), "nothing decided", console)
    assert "nothing decided: 1 pairs of 1 prompts" in console.file.getvalue()  # type: ignore[attr-defined]


def test_the_reliability_plot_is_the_same_bytes_twice(tmp_path: Any) -> None:
    pytest.importorskip("matplotlib")
    from align.figures.calibration_plot import draw_reliability

    figures = calibration_figures(numbered([0.8, 0.9, 0.3, 0.6, 1.0]))
    for name in ("a.svg", "b.svg"):
        draw_reliability(figures, "judge", tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert "the judge, 5 pairs" in (tmp_path / "a.svg").read_text()
