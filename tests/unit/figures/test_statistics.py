"""Intervals and calibration against values worked out by hand, brute force, and their definitions."""

import itertools
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.figures.statistics import (
    bootstrap_interval,
    clustered_share_estimate,
    clustered_wilson_estimate,
    expected_calibration_error,
    mean_estimate,
    paired_difference,
    paired_share_difference,
    reliability_bins,
    share_estimate,
    wilson_interval,
)
from align.figures.student import student_quantile

Z95 = 1.959963984540054


def test_wilson_interval_of_ten_in_a_hundred_is_the_published_one():
    assert wilson_interval(10, 100) == pytest.approx((0.0552291, 0.1743657), abs=1e-6)


def test_wilson_interval_of_no_success_ends_at_the_closed_form():
    low, high = wilson_interval(0, 10)
    assert low == pytest.approx(0, abs=1e-12)
    assert high == pytest.approx(Z95**2 / (10 + Z95**2))


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_ends_are_the_shares_that_lie_z_standard_errors_away(case):
    successes, n = case
    for end in wilson_interval(successes, n):
        assert abs(successes / n - end) == pytest.approx(Z95 * (end * (1 - end) / n) ** 0.5, abs=1e-6)


def test_wilson_interval_of_no_counts_is_the_whole_range():
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_wilson_interval_widens_with_confidence():
    narrow, wide = wilson_interval(30, 60, 0.8), wilson_interval(30, 60, 0.99)
    assert wide[0] < narrow[0] < 0.5 < narrow[1] < wide[1]


@pytest.mark.parametrize(("successes", "n"), [(-1, 5), (6, 5)])
def test_wilson_interval_refuses_impossible_counts(successes, n):
    with pytest.raises(ValueError, match="successes"):
        wilson_interval(successes, n)


def test_bootstrap_interval_equals_the_quantiles_of_every_resample_enumerated():
    values = [0.0, 1.0, 4.0, 10.0]
    every_mean = [sum(draw) / 4 for draw in itertools.product(values, repeat=4)]
    outside = NormalDist().cdf(-((4 / 3) ** 0.5) * 1.63774)  # Student's t with 3 degrees of freedom, 80%
    exact = np.quantile(every_mean, [outside, 1 - outside])
    assert bootstrap_interval(values, seed=1, resamples=40_000, confidence=0.8) == pytest.approx(exact, abs=0.26)


def test_bootstrap_interval_of_many_values_is_the_normal_one():
    values = np.random.default_rng(5).normal(3, 2, size=900)
    half = Z95 * values.std() / 30
    expected = (values.mean() - half, values.mean() + half)
    assert bootstrap_interval(values, seed=2, resamples=8000) == pytest.approx(expected, abs=0.012)


def test_bootstrap_interval_follows_from_its_seed():
    values = list(range(20))
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)
    assert bootstrap_interval(values, seed=3) != bootstrap_interval(values, seed=4)


def test_bootstrap_interval_covers_the_mean_about_as_often_as_claimed():
    generator = np.random.default_rng(0)
    covered = 0
    for trial in range(300):
        low, high = bootstrap_interval(generator.normal(size=40), seed=trial, resamples=300)
        covered += low <= 0 <= high
    assert 0.90 <= covered / 300 <= 0.98


def test_resampling_in_blocks_draws_as_many_means(monkeypatch):
    monkeypatch.setattr("align.figures.statistics._DRAWN_AT_ONCE", 30)
    low, high = bootstrap_interval(range(10), seed=0, resamples=1000)
    assert 2 < low < 4.5 < high < 7


@pytest.mark.parametrize("values", [[], [[1.0, 2.0]], [1.0, float("nan")]])
def test_bootstrap_interval_refuses_what_has_no_mean(values):
    with pytest.raises(ValueError, match=r"number|finite"):
        bootstrap_interval(values, seed=0)


def test_mean_estimate_holds_mean_interval_and_count():
    estimate = mean_estimate([1.0, 2.0, 6.0], seed=0)
    assert (estimate.mean, estimate.n) == (3.0, 3)
    assert 1.0 <= estimate.low < 3.0 < estimate.high <= 6.0


def test_share_estimate_does_not_claim_certainty_where_all_are_equal():
    for successes in (0, 30):
        estimate = share_estimate([successes / 30] * 30, seed=0)
        assert (estimate.mean, estimate.n) == (successes / 30, 30)
        assert (estimate.low, estimate.high) == pytest.approx(wilson_interval(successes, 30), abs=1e-12)


def test_share_estimate_of_ties_alone_leaves_room_on_both_sides():
    estimate = share_estimate([0.5] * 30, seed=0)
    unseen = Z95**2 / (30 + Z95**2)
    assert (estimate.low, estimate.high) == pytest.approx((0.5 - unseen / 2, 0.5 + unseen / 2))


def test_share_estimate_of_mixed_values_is_the_bootstrap():
    values = [1, 0, 0.5, 1]
    assert share_estimate(values, seed=7) == mean_estimate(values, seed=7)


def test_share_estimate_refuses_values_that_are_no_shares():
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        share_estimate([0.5, 1.5], seed=0)


def test_paired_difference_sees_a_constant_shift_that_lies_within_the_spread():
    second = np.random.default_rng(1).normal(0, 50, size=30)
    assert paired_difference(second + 1, second, seed=0).low == pytest.approx(1)
    assert paired_difference(second + 1, second, seed=0).high == pytest.approx(1)


def test_paired_difference_turns_its_sign_with_the_sides():
    a, b = [3.0, 5.0, 9.0, 1.0], [1.0, 2.0, 3.0, 4.0]
    forward, backward = paired_difference(a, b, seed=0), paired_difference(b, a, seed=0)
    assert forward.mean == -backward.mean == 2.0
    assert (forward.low, forward.high) == pytest.approx((-backward.high, -backward.low))


def test_paired_difference_refuses_unpaired_values():
    with pytest.raises(ValueError, match="as many"):
        paired_difference([1.0, 2.0], [1.0], seed=0)


def test_one_pair_proves_no_difference_of_shares():
    estimate = paired_share_difference([1.0], [0.0], seed=0)
    assert (estimate.mean, estimate.high) == (1.0, 1.0)
    assert estimate.low < 0


def test_shares_alike_in_every_pair_may_still_differ_by_what_was_not_seen():
    estimate = paired_share_difference([1, 0, 1, 1], [1, 0, 1, 1], seed=0)
    unseen = Z95**2 / (4 + Z95**2)
    assert (estimate.mean, estimate.low, estimate.high) == pytest.approx((0, -unseen, unseen))


def test_paired_share_difference_of_mixed_pairs_is_the_paired_bootstrap():
    first, second = [1, 0, 0.5, 1], [0, 0, 1, 1]
    assert paired_share_difference(first, second, seed=7) == paired_difference(first, second, seed=7)


def test_reliability_bins_worked_by_hand():
    bins = reliability_bins([0.0, 0.2, 0.5, 0.9, 1.0], [0, 1, 1, 1, 0], bins=2)
    assert [(each.low, each.high, each.count) for each in bins] == [(0.0, 0.5, 3), (0.5, 1.0, 2)]
    assert [each.mean_probability for each in bins] == pytest.approx([0.7 / 3, 0.95])
    assert [each.share for each in bins] == pytest.approx([2 / 3, 0.5])


def test_calibration_error_worked_by_hand():
    expected = 3 / 5 * (2 / 3 - 0.7 / 3) + 2 / 5 * (0.95 - 0.5)
    assert expected_calibration_error([0.0, 0.2, 0.5, 0.9, 1.0], [0, 1, 1, 1, 0], bins=2) == pytest.approx(expected)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=50), st.integers(1, 20))
def test_predictions_that_come_true_are_calibrated_and_each_is_binned_once(probabilities, bins):
    assert expected_calibration_error(probabilities, probabilities, bins) == pytest.approx(0, abs=1e-12)
    assert sum(each.count for each in reliability_bins(probabilities, probabilities, bins)) == len(probabilities)


def test_calibration_of_a_sure_and_always_wrong_predictor_is_one():
    assert expected_calibration_error([1.0, 1.0, 0.0], [0, 0, 1]) == 1.0


def test_reliability_bins_refuse_what_is_no_probability():
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        reliability_bins([1.2], [1])


def test_the_interval_over_clusters_equals_the_quantiles_of_every_resample_enumerated():
    clusters = {"a": [1.0, 1.0, 0.0], "b": [0.0], "c": [1.0, 0.5]}
    values = [value for own in clusters.values() for value in own]
    names = [name for name, own in clusters.items() for _ in own]
    means = [
        np.mean([value for name in drawn for value in clusters[name]])
        for drawn in itertools.product(clusters, repeat=3)
    ]
    found = clustered_share_estimate(values, names, seed=1, resamples=40_000, confidence=0.6)
    assert found.mean == pytest.approx(np.mean(values))
    # Two of the 27 means can be close to each other, and the quantile of drawn means can be either.
    outside = NormalDist().cdf(-((3 / 2) ** 0.5) * 1.06066)  # Student's t with 2 degrees of freedom, 60%
    low, high = (sorted(means)[round(share * 26)] for share in (outside, 1 - outside))
    assert found.low == pytest.approx(low, abs=0.01) and found.high == pytest.approx(high, abs=0.01)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=20), st.integers(0, 5))
def test_clusters_of_one_value_each_are_no_clusters(values, seed):
    names = [f"{number:02d}" for number in range(len(values))]
    plain, clustered = share_estimate(values, seed, 50), clustered_share_estimate(values, names, seed, 50)
    assert (clustered.low, clustered.high, clustered.n) == pytest.approx((plain.low, plain.high, plain.n))


def test_a_cluster_written_twice_counts_no_more_than_once():
    values, names = [1.0, 0.0, 1.0, 1.0], ["a", "b", "c", "d"]
    once = clustered_share_estimate(values, names, 3)
    twice = clustered_share_estimate(values * 2, names * 2, 3)
    assert (once.low, once.high) == (twice.low, twice.high)
    assert share_estimate(values * 2, 3).low > once.low, "as eight independent values they would claim more certainty"


def test_clusters_that_are_all_alike_have_wilson_s_interval_of_as_many_values():
    found = clustered_share_estimate([1.0] * 6, ["a", "a", "b", "b", "c", "c"], 0)
    assert (found.mean, found.n) == (1.0, 6)
    assert (found.low, found.high) == pytest.approx(wilson_interval(3, 3))
    alone = clustered_share_estimate([1.0, 0.0], ["a", "a"], 0)
    assert alone.low < 0.2 and alone.high > 0.8, "one prompt proves nothing"


def test_each_value_needs_a_cluster():
    with pytest.raises(ValueError, match="2 values and 1 clusters"):
        clustered_share_estimate([1.0, 0.0], ["a"], 0)


def test_wilson_over_clusters_is_wilson_s_where_each_value_is_a_cluster_of_its_own() -> None:
    values = [1.0] * 7 + [0.0] * 4
    found = clustered_wilson_estimate(values, [str(n) for n in range(11)])
    assert (found.mean, found.n) == (pytest.approx(7 / 11), 11)
    assert (found.low, found.high) == pytest.approx(wilson_interval(7, 11))


@pytest.mark.parametrize("right", [0, 7, 11])
def test_copies_of_a_value_in_its_cluster_add_no_certainty(right: int) -> None:
    values, names = [1.0] * right + [0.0] * (11 - right), [str(n) for n in range(11)]
    copied = clustered_wilson_estimate(values * 3, names * 3)
    assert (copied.low, copied.high) == pytest.approx(wilson_interval(right, 11))
    assert copied.n == 33


def test_uncorrelated_clusters_narrow_no_interval() -> None:
    found = clustered_wilson_estimate([1.0, 0.0] * 6, [str(n // 2) for n in range(12)])
    low, high = wilson_interval(6, 12)
    assert found.low < low and found.high > high, "six clusters cannot show that they are this even"


def test_bins_may_be_given_by_their_edges() -> None:
    bins = reliability_bins([0.5, 0.6, 0.7, 0.9], [0, 1, 1, 1], [0.5, 0.6, 1.0])
    assert [(each.low, each.high, each.count, each.share) for each in bins] == [(0.5, 0.6, 2, 0.5), (0.6, 1.0, 2, 1.0)]
    with pytest.raises(ValueError, match="rising edges"):
        reliability_bins([0.5], [1], [0.5, 0.5])


@pytest.mark.parametrize(
    ("confidence", "degrees", "published"),
    [(0.95, 1, 12.706), (0.95, 2, 4.303), (0.95, 7, 2.365), (0.99, 10, 3.169), (0.8, 30, 1.310), (0.95, 100, 1.984)],
)
def test_students_quantiles_are_the_published_ones(confidence: float, degrees: int, published: float) -> None:
    assert student_quantile(confidence, degrees) == pytest.approx(published, abs=6e-4)


def covered(interval: Any, clusters: int, share: float, correlation: float, trials: int) -> float:
    """How often a 95% interval holds the true share: clusters of 5 answers, alike within them (beta-binomial)."""
    generator = np.random.default_rng(clusters)
    names = [str(number) for number in range(clusters) for _ in range(5)]
    size = (1 - correlation) / correlation
    hits = 0
    for trial in range(trials):
        own = generator.beta(share * size, (1 - share) * size, size=clusters)
        values = (generator.random((clusters, 5)) < own[:, None]).astype(float).ravel()
        found = interval(values, names, trial)
        hits += found.low <= share <= found.high
    return hits / trials


@pytest.mark.parametrize("clusters", [5, 8, 12, 30])
@pytest.mark.parametrize(("share", "correlation"), [(0.5, 0.3), (0.75, 0.3), (0.6, 0.7)])
def test_wilson_over_few_clusters_covers_as_often_as_it_claims(clusters: int, share: float, correlation: float) -> None:
    """With a design effect alone it covers 87 to 88% for 5 clusters, and 90 to 93% for 8."""
    rate = covered(lambda values, names, _: clustered_wilson_estimate(values, names), clusters, share, correlation, 800)
    assert 0.935 <= rate <= 0.99


@pytest.mark.parametrize(("clusters", "least"), [(5, 0.90), (8, 0.93), (12, 0.93), (30, 0.935)])
def test_the_bootstrap_over_few_clusters_covers_about_as_often_as_it_claims(clusters: int, least: float) -> None:
    """Plain percentiles cover 83% for 5 clusters, and 92% for 8."""
    rate = covered(
        lambda values, names, seed: clustered_share_estimate(values, names, seed, 1000), clusters, 0.5, 0.3, 400
    )
    assert least <= rate <= 0.99
