"""Standardised scores and the adaptive KL coefficient, against worked figures."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from align.rl.rewards import Rewards, RewardSource, RunningMoments, adapted_kl_coef, standardise
from align.rl.settings import ScoreBlock

batches = st.lists(st.lists(st.floats(-100, 100), min_size=1, max_size=6), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(batches)
def test_running_moments_are_those_of_everything_seen(values):
    moments = RunningMoments()
    for batch in values:
        moments.update(torch.tensor(batch, dtype=torch.float64))
    whole = torch.tensor([value for batch in values for value in batch], dtype=torch.float64)
    assert moments.mean == pytest.approx(float(whole.mean()), abs=1e-9)
    spread = float(whole.std(correction=0))
    if spread > 1e-6:
        assert moments.std == pytest.approx(spread, rel=1e-6)


def test_scores_without_spread_are_not_blown_up():
    moments = RunningMoments()
    moments.update(torch.full((4,), 2.0))
    assert standardise(torch.full((4,), 2.0), moments.mean, moments.std, 5.0).tolist() == [0.0] * 4


def test_standardised_scores_are_clipped():
    assert standardise(torch.tensor([1.0, 3.0, 99.0]), 1.0, 2.0, 5.0).tolist() == [0.0, 1.0, 5.0]
    assert standardise(torch.tensor([99.0]), 1.0, 2.0, None).tolist() == [49.0]


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (6.0, 0.1),  # on target
        (6.6, 0.1 * (1 + 0.1 * 64 / 1000)),  # 10% above
        (60.0, 0.1 * (1 + 0.2 * 64 / 1000)),  # the error is held at 0.2
        (0.0, 0.1 * (1 - 0.2 * 64 / 1000)),
    ],
)
def test_kl_coefficient_follows_its_target(kl, expected):
    assert adapted_kl_coef(0.1, kl, target=6.0, completions=64, horizon=1000) == pytest.approx(expected)


@settings(max_examples=60, deadline=None)
@given(st.floats(-5, 500), st.integers(1, 4096), st.integers(1, 100_000))
def test_one_batch_changes_the_kl_coefficient_by_a_fifth_at_most(kl, completions, horizon):
    changed = adapted_kl_coef(0.05, kl, 6.0, completions, horizon)
    assert 0.8 * 0.05 - 1e-12 <= changed <= 1.2 * 0.05 + 1e-12


def test_moments_are_those_of_the_scores_that_were_given():
    """Three quarters of the completions have no score: the mean that stands for them must not narrow the spread."""
    given_scores = torch.randn(4096, generator=torch.Generator().manual_seed(0)) * 2 + 5
    scored = torch.arange(4096) % 4 == 0
    filled = torch.where(scored, given_scores, given_scores[scored].mean())[:, None]
    source = RewardSource("judge", lambda prompts, texts: filled[:, 0])
    standardised = Rewards([source], ScoreBlock(normalise="running", clip=None)).standardised(filled, scored[:, None])
    assert source.seen.count == 1024
    assert source.seen.std == pytest.approx(float(given_scores[scored].std(correction=0)), rel=1e-6)
    assert standardised[scored].std(correction=0).item() == pytest.approx(1, rel=1e-5)
    assert standardised[~scored].abs().max() < 1e-5
