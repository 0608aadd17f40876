"""Moving means and the length-controlled score, against numpy."""

import numpy as np
import pytest
import torch

from align.rl.metric_history import length_controlled_score, moving_means
from align.rl.rollout_figures import least_squares_slope

COMPLETIONS = 24


def rollouts(iterations, seed=0):
    """(score, length) of each completion: better and longer from iteration to iteration, and longer is better too."""
    generator = np.random.default_rng(seed)
    for iteration in range(iterations):
        lengths = generator.integers(5, 30, COMPLETIONS) + iteration
        scores = 0.3 * iteration + 0.05 * lengths + generator.normal(0, 0.2, COMPLETIONS)
        yield scores, lengths.astype(float)


def history_of(found, window=4):
    """Rows as a trainer makes them of its completions' (scores, lengths)."""
    history = []
    for number, (scores, lengths) in enumerate(found, start=1):
        row = {
            "step": number,
            "score": float(scores.mean()),
            "completion_length": float(lengths.mean()),
            "completion_length_std": float(lengths.std()),
            "score_length_slope": least_squares_slope(torch.tensor(lengths), torch.tensor(scores)),
        }
        history.append(row)
        row["score_length_controlled"] = length_controlled_score(history, window)
    return history


def slope_and_levels(found):
    """numpy's regression of score on length, with a level for each iteration."""
    scores, lengths = (np.concatenate(each) for each in zip(*found, strict=True))
    levels = np.repeat(np.eye(len(found)), COMPLETIONS, axis=0)
    coefficients, *_ = np.linalg.lstsq(np.column_stack([levels, lengths]), scores, rcond=None)
    return coefficients[-1], coefficients[:-1]


@pytest.mark.parametrize("window", [1, 4, 100])
def test_each_step_in_length_counts_by_numpys_slope_of_the_iterations_around_it(window):
    found = list(rollouts(9))
    expected = found[0][0].mean()
    for now in range(1, 9):
        slope, _ = slope_and_levels(found[max(0, now + 1 - window) : now + 1])
        scores, lengths = ([each[kind].mean() for each in found[now - 1 : now + 1]] for kind in (0, 1))
        expected += scores[1] - scores[0] - slope * (lengths[1] - lengths[0])
    assert history_of(found, window)[-1]["score_length_controlled"] == pytest.approx(expected, rel=1e-9)


def test_with_one_slope_it_is_the_adjusted_mean_of_an_analysis_of_covariance():
    found = []
    for scores, lengths in rollouts(6):
        within, _ = slope_and_levels([(scores, lengths)])
        found.append((scores + (0.05 - within) * (lengths - lengths.mean()), lengths))
    slope, levels = slope_and_levels(found)
    assert slope == pytest.approx(0.05)
    adjusted = levels[-1] + slope * found[0][1].mean()
    assert history_of(found)[-1]["score_length_controlled"] == pytest.approx(adjusted, rel=1e-9)


def test_what_length_alone_brings_is_gone_at_equal_length_and_what_it_does_not_stays():
    generator = np.random.default_rng(1)
    lengths = [generator.integers(5, 30, COMPLETIONS) + 4.0 * iteration for iteration in range(6)]
    only_longer = history_of([(0.05 * each, each) for each in lengths])
    assert only_longer[-1]["score_length_controlled"] == pytest.approx(only_longer[0]["score"])
    better_too = history_of([(0.05 * each + 0.3 * number, each) for number, each in enumerate(lengths)])
    assert better_too[-1]["score_length_controlled"] == pytest.approx(better_too[0]["score"] + 0.3 * 5)


def test_completions_of_one_length_have_nothing_to_control_for():
    same = history_of([(np.array([0.1, 0.5]), np.array([8.0, 8.0])), (np.array([0.4, 0.8]), np.array([8.0, 8.0]))])
    assert [row["score_length_slope"] for row in same] == [0, 0]
    assert same[-1]["score_length_controlled"] == pytest.approx(same[-1]["score"])


def test_the_slope_is_numpys():
    x, y = np.random.default_rng(2).normal(size=(2, 40))
    assert least_squares_slope(torch.tensor(x), torch.tensor(y)) == pytest.approx(np.polyfit(x, y, 1)[0])


def test_a_moving_mean_is_there_from_the_first_whole_window_and_passes_over_rows_without_the_figure():
    figures = [1.0, None, 3.0, 8.0]
    history = [{"step": number, "score": figure} for number, figure in enumerate(figures, start=1)]
    assert moving_means(history, "score", 2) == {3: 2.0, 4: 5.5}
    assert moving_means(history, "score", 4) == {}
    assert moving_means(history, "reward", 1) == {}
