"""Best-of-n against every subset, fits against known coefficients, and properties that hold for any rewards."""

import math
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from align.evaluation.overoptimisation import (
    BEST_OF_N_LAW,
    RL_LAW,
    Points,
    PromptSums,
    best_of_kl,
    best_of_sums,
    expected_best_of,
    fit_curve,
    least_squares,
    rollout_sums,
)

SAME_SCALE = {"proxy": 1.0, "gold": 1.0}
# A machine that stalls must not fail a test.
CALM = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
FEW_VALUES = st.integers(min_value=0, max_value=4).map(float)


def over_all_subsets(proxy, values, n):
    """Mean over all subsets of n of the value with the highest proxy; the mean value if several share it."""
    found = []
    for subset in combinations(range(len(proxy)), n):
        highest = max(proxy[place] for place in subset)
        best = [values[place] for place in subset if proxy[place] == highest]
        found.append(sum(best) / len(best))
    return sum(found) / len(found)


@settings(max_examples=60, **CALM)
@given(st.lists(st.tuples(FEW_VALUES, st.floats(-5, 5)), min_size=1, max_size=7), st.integers(1, 7))
def test_the_estimate_is_the_mean_over_every_subset_ties_included(rows, n):
    proxy, values = (list(each) for each in zip(*rows, strict=True))
    n = min(n, len(rows))
    [found] = expected_best_of(np.array([proxy]), np.array([values]), n)
    assert found == pytest.approx(over_all_subsets(proxy, values, n), abs=1e-9)


def test_the_best_of_one_is_the_mean_and_of_all_the_highest():
    proxy, gold = np.array([[3.0, 1.0, 2.0]]), np.array([[10.0, 20.0, 60.0]])
    assert expected_best_of(proxy, gold, 1) == pytest.approx(30)
    assert expected_best_of(proxy, gold, 3) == pytest.approx(10)
    # Of two: {3,1} and {3,2} choose 3, {1,2} chooses 2.
    assert expected_best_of(proxy, gold, 2) == pytest.approx((10 + 10 + 60) / 3)


@settings(max_examples=60, **CALM)
@given(st.lists(st.floats(-100, 100), min_size=2, max_size=12))
def test_more_to_choose_from_never_lowers_the_proxy(scores):
    proxy = np.array([scores])
    expected = [expected_best_of(proxy, proxy, n)[0] for n in range(1, len(scores) + 1)]
    assert all(later >= earlier - 1e-9 for earlier, later in pairwise(expected))


@settings(max_examples=60, **CALM)
@given(st.lists(st.tuples(FEW_VALUES, st.floats(-5, 5)), min_size=2, max_size=8), st.randoms())
def test_the_order_of_the_draws_does_not_matter(rows, random):
    shuffled = list(rows)
    random.shuffle(shuffled)
    one, other = (np.array([list(each) for each in zip(*order, strict=True)]) for order in (rows, shuffled))
    assert expected_best_of(one[:1], one[1:], 2) == pytest.approx(expected_best_of(other[:1], other[1:], 2), abs=1e-9)


def test_the_estimate_is_what_drawing_n_and_taking_the_best_gives_on_average():
    generator = np.random.default_rng(0)
    proxy = generator.normal(size=(4000, 6))
    gold = 0.5 * proxy + generator.normal(size=proxy.shape)
    drawn = np.take_along_axis(gold[:, :4], proxy[:, :4].argmax(axis=1)[:, None], axis=1).mean()
    assert expected_best_of(proxy, gold, 4).mean() == pytest.approx(drawn, abs=0.05)
    # The expected highest of four standard normals is 1.0294, of which the gold has half.
    assert expected_best_of(proxy, gold, 4).mean() == pytest.approx(0.5 * 1.0294, abs=0.03)


@pytest.mark.parametrize("n", [0, 4])
def test_n_must_not_exceed_the_number_of_completions(n):
    with pytest.raises(ValueError, match="from 1 to 3"):
        expected_best_of(np.zeros((2, 3)), np.zeros((2, 3)), n)


@pytest.mark.parametrize("n", [1, 2, 7, 64])
def test_the_divergence_is_that_of_the_highest_of_n_uniform_numbers_from_one(n):
    """By rank u, best-of-n has density n u^(n-1) where the policy has 1; the KL is the mean of the density's log."""
    places = (np.arange(1_000_000) + 0.5) / 1_000_000
    log_density = math.log(n) + (n - 1) * np.log(places)
    assert best_of_kl(n) == pytest.approx(float((np.exp(log_density) * log_density).mean()), abs=1e-4)


def test_the_curve_of_best_of_n_starts_at_the_policy_and_weighs_prompts_equally():
    proxy, gold = np.array([[0.0, 2.0], [4.0, 6.0]]), np.array([[1.0, 0.0], [3.0, 2.0]])
    points = best_of_sums(proxy, gold, (1, 2)).all_points({"proxy": 2.0, "gold": 0.5})
    assert points.kl.tolist() == [0.0, math.log(2) - 0.5]
    assert points.proxy.tolist() == [0.0, (4 - 3) / 2]
    assert points.gold.tolist() == [0.0, (1 - 1.5) / 0.5]


def test_the_curve_of_training_is_the_mean_of_each_iterations_completions():
    rows = [("a", 1, 0.0, 1.0, 5.0), ("b", 1, 0.0, 3.0, 7.0), ("b", 2, 4.0, 9.0, 1.0), ("c", 2, 5.0, 7.0, 3.0)]
    prompts, iterations, *numbers = (list(each) for each in zip(*reversed(rows), strict=True))
    points = rollout_sums(prompts, iterations, *map(np.array, numbers)).all_points({"proxy": 2.0, "gold": 4.0})
    assert points.kl.tolist() == [0.0, 4.5]
    assert points.proxy.tolist() == [0.0, (8 - 2) / 2]
    assert points.gold.tolist() == [0.0, (2 - 6) / 4]


def test_a_prompt_drawn_twice_counts_twice_and_a_point_without_prompts_is_not_measured():
    sums = rollout_sums(["a", "b", "b"], [1, 1, 2], *np.array([[0, 0, 1], [0, 3, 4], [0, 3, 4]], dtype=float))
    assert sums.points(np.array([2.0, 1.0]), SAME_SCALE).proxy.tolist() == [0.0, 4 - 1]
    assert np.isnan(sums.points(np.array([2.0, 0.0]), SAME_SCALE).proxy).tolist() == [False, True]


@settings(max_examples=60, **CALM)
@given(
    st.sampled_from([BEST_OF_N_LAW, RL_LAW]),
    st.floats(-3, 3),
    st.floats(-3, 3),
    st.lists(st.floats(0.05, 30), min_size=2, max_size=8, unique_by=lambda kl: round(kl, 1)),
)
def test_known_coefficients_are_found_again(law, alpha, beta, divergences):
    kl = np.array([0.0, *divergences])
    d = np.sqrt(kl)
    penalty = d**2 if law is BEST_OF_N_LAW else np.array([0.0, *(x * math.log(x) for x in d[1:])])
    rewards = alpha * d - beta * penalty
    found = least_squares(law, Points(kl, rewards, -rewards))
    assert found[:, 0] == pytest.approx([alpha, beta], abs=1e-5)
    assert found[:, 1] == pytest.approx([-alpha, -beta], abs=1e-5)


@pytest.mark.parametrize("law", [BEST_OF_N_LAW, RL_LAW], ids=["best-of-n", "rl"])
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.3), (0.2, 0.8), (3.0, 1.0)])
def test_no_other_distance_gives_more_than_the_peak(law, alpha, beta):
    around = np.linspace(0.001, 60, 600_001)
    assert around[law.at(around, alpha, beta).argmax()] == pytest.approx(law.peak(alpha, beta), abs=1e-3)


def test_a_law_with_too_small_a_penalty_has_no_peak():
    kl = np.tile(np.linspace(0, 9, 5), (3, 1))
    for alpha, beta in ((1.0, 1e-4), (1.0, 0.0), (1.0, -0.5)):
        reward = RL_LAW.at(np.sqrt(kl), alpha, beta)
        sums = PromptSums(np.ones_like(kl), kl, reward, reward)
        assert fit_curve(RL_LAW, sums, SAME_SCALE, 0, 5)["gold"].peak is None


@pytest.mark.parametrize("divergences", [[0.0, 1.0], [0.0, 1.0, 1.0], [0.0, -0.1, 0.0]])
def test_a_single_distance_does_not_determine_the_coefficients(divergences):
    kl = np.array(divergences)
    with pytest.raises(ValueError, match="two or more points"):
        least_squares(BEST_OF_N_LAW, Points(kl, kl, kl))


def noisy_run(prompts: int, alpha: float, beta: float, seed: int) -> PromptSums:
    """Each prompt once per iteration, with rewards that scatter around the RL law."""
    generator = np.random.default_rng(seed)
    kl = np.tile(np.linspace(0, 16, 12), (prompts, 1))
    rewards = RL_LAW.at(np.sqrt(kl), alpha, beta) + generator.normal(size=kl.shape)
    return PromptSums(np.ones_like(kl), kl, rewards, rewards)


def test_intervals_cover_the_true_coefficients_about_as_often_as_stated():
    fits = [fit_curve(RL_LAW, noisy_run(40, 1.0, 0.4, seed), SAME_SCALE, seed, 200)["gold"] for seed in range(60)]
    held = [fit.beta.low <= 0.4 <= fit.beta.high for fit in fits]
    assert 0.85 <= sum(held) / len(held) <= 1
    assert all(fit.alpha.low <= fit.alpha.value <= fit.alpha.high for fit in fits)


def test_the_same_seed_gives_the_same_intervals_and_an_exact_law_explains_everything():
    kl = np.tile(np.linspace(0, 9, 5), (3, 1))
    reward = BEST_OF_N_LAW.at(np.sqrt(kl), 2.0, 0.5)
    sums = PromptSums(np.ones_like(kl), kl, -reward, reward)
    one, two = (fit_curve(BEST_OF_N_LAW, sums, SAME_SCALE, 7) for _ in range(2))
    assert one == two
    assert one["gold"].r_squared == pytest.approx(1)
    assert one["gold"].peak == pytest.approx(2)
    assert one["proxy"].peak is None, "it falls at once and then rises without end"


@settings(max_examples=20, **CALM)
@given(st.integers(0, 1000))
def test_resamples_without_the_policys_own_prompts_are_drawn_again(seed):
    """Only one of four prompts was drawn in the first iteration: a third of the resamples lack it."""
    sums = rollout_sums(
        ["a", "b", "c", "d", "b", "c", "d"], [1, 2, 2, 2, 3, 3, 3], *np.tile([0.0, 1, 2, 3, 4, 5, 6], (3, 1))
    )
    fits = fit_curve(RL_LAW, sums, SAME_SCALE, seed, 20)
    assert all(math.isfinite(each.low) and math.isfinite(each.high) for each in (fits["gold"].alpha, fits["gold"].beta))


def test_too_few_prompts_to_resample_are_an_error(monkeypatch):
    """Each of three points has a different prompt: two resamples in nine have them all."""
    monkeypatch.setattr("align.evaluation.overoptimisation.MAX_DRAWS_PER_RESAMPLE", 1)
    sums = rollout_sums(["a", "b", "c"], [1, 2, 3], *np.array([[0.0, 1, 4]] * 3))
    with pytest.raises(ValueError, match="3 prompts are too few"):
        fit_curve(RL_LAW, sums, SAME_SCALE, 0, 20)
