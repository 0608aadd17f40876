"""PPO's rewards and advantages against figures worked by hand, slow references and properties."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from align.rl.advantages import (
    explained_variance,
    generalised_advantages,
    group_relative_advantages,
    groups_of_equals,
    kl_terms,
    last_token_mask,
    leave_one_out_advantages,
    penalised_rewards,
    whiten,
)

lengths_strategy = st.lists(st.integers(0, 6), min_size=1, max_size=5)


def mask_of(lengths: list[int], width: int = 6) -> torch.Tensor:
    return torch.arange(width)[None, :] < torch.tensor(lengths)[:, None]


def test_advantages_worked_by_hand():
    # gamma 0.5, lam 0.5: delta = [1 + .5*2 - 1, 3 - 2] = [1, 1]; A = [1 + .25*1, 1]; returns = A + V
    rewards, values = torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([[1.0, 2.0, 9.0]])
    advantages, returns = generalised_advantages(rewards, values, mask_of([2], 3), gamma=0.5, lam=0.5)
    assert advantages.tolist() == [[1.25, 1.0, 0.0]]
    assert returns.tolist() == [[2.25, 3.0, 0.0]]


def slow_advantages(rewards, values, length, gamma, lam):
    """The definition: A_t is the sum over l of (gamma lam)^l delta_{t+l}, with value 0 past the end."""
    value = [*values[:length], 0.0]
    deltas = [rewards[t] + gamma * value[t + 1] - value[t] for t in range(length)]
    return [sum((gamma * lam) ** (s - t) * deltas[s] for s in range(t, length)) for t in range(length)]


@settings(max_examples=60, deadline=None)
@given(lengths_strategy, st.floats(0, 1), st.floats(0, 1), st.integers(0, 10**6))
def test_advantages_equal_the_definition_whatever_the_padding(lengths, gamma, lam, seed):
    generator = torch.Generator().manual_seed(seed)
    rewards, values = (torch.randn(len(lengths), 6, generator=generator, dtype=torch.float64) for _ in range(2))
    advantages, returns = generalised_advantages(rewards, values, mask_of(lengths), gamma, lam)
    for row, length in enumerate(lengths):
        expected = slow_advantages(rewards[row].tolist(), values[row].tolist(), length, gamma, lam)
        assert advantages[row, :length].tolist() == pytest.approx(expected, abs=1e-9)
        assert advantages[row, length:].abs().sum() == 0 and returns[row, length:].abs().sum() == 0


def test_with_lambda_one_the_return_is_the_discounted_sum_of_rewards():
    rewards, values = torch.randn(2, 4), torch.randn(2, 4)
    _, returns = generalised_advantages(rewards, values, mask_of([4, 4], 4), gamma=1.0, lam=1.0)
    assert torch.allclose(returns, rewards.flip(1).cumsum(1).flip(1), atol=1e-6)


def test_shapes_that_differ_are_named():
    with pytest.raises(ValueError, match=r"\(1, 2\).*\(1, 3\)"):
        generalised_advantages(torch.zeros(1, 2), torch.zeros(1, 3), torch.ones(1, 2, dtype=torch.bool), 1.0, 1.0)


def test_score_lands_on_the_last_token_that_counts():
    mask = mask_of([3, 1, 0], 3)
    assert last_token_mask(mask).tolist() == [[False, False, True], [True, False, False], [False] * 3]
    rewards = penalised_rewards(torch.tensor([5.0, 7.0, 9.0]), torch.ones(3, 3), mask, kl_coef=0.1)
    assert torch.allclose(rewards, torch.tensor([[-0.1, -0.1, 4.9], [6.9, 0.0, 0.0], [0.0, 0.0, 0.0]]))


def test_kl_estimators_worked_by_hand():
    terms = kl_terms(torch.tensor([[math.log(0.5)]]), torch.tensor([[math.log(0.25)]]))
    ratio = math.log(0.25 / 0.5)
    assert terms["k1"].item() == pytest.approx(-ratio)
    assert terms["k2"].item() == pytest.approx(ratio**2 / 2)
    assert terms["k3"].item() == pytest.approx(0.5 - 1 - ratio)


def test_k1_and_k3_average_to_the_exact_kl_over_the_policy():
    generator = torch.Generator().manual_seed(0)
    policy, reference = torch.randn(2, 1, 9, generator=generator, dtype=torch.float64).log_softmax(-1)
    exact = (policy.exp() * (policy - reference)).sum()
    terms = kl_terms(policy, reference)
    for name in ("k1", "k3"):
        assert (policy.exp() * terms[name]).sum().item() == pytest.approx(exact.item())
    assert (terms["k3"] >= 0).all()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=2, max_size=5), st.integers(0, 10**6))
def test_whitening_ignores_what_is_masked(lengths, seed):
    values = torch.randn(len(lengths), 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3 + 5
    mask = mask_of(lengths)
    white = whiten(values, mask)
    noisy = whiten(torch.where(mask, values, 1e6), mask)
    assert torch.allclose(white, noisy)
    assert white[mask].mean().abs() < 1e-9
    if int(mask.sum()) > 1:
        assert white[mask].var(correction=0).item() == pytest.approx(1, abs=1e-4)


def test_leave_one_out_worked_by_hand():
    advantages = leave_one_out_advantages(torch.tensor([1.0, 2.0, 6.0, 0.0, 0.0, 3.0]), groups=2)
    assert advantages.tolist() == [-3.0, -1.5, 4.5, -1.5, -1.5, 3.0]


def test_group_relative_advantages_are_standardised_within_each_group():
    advantages = group_relative_advantages(torch.tensor([1.0, 3.0, 5.0, 5.0]), torch.zeros(4), groups=2)
    assert advantages.tolist() == pytest.approx([-1, 1, 0, 0], abs=1e-3)


def test_only_scores_are_standardised_and_the_penalties_come_off_as_they_are():
    advantages = group_relative_advantages(
        torch.tensor([1.0, 3.0, 5.0, 5.0]), torch.tensor([0.2, 0.0, 0.01, 0.03]), groups=2
    )
    assert advantages.tolist() == pytest.approx([-1 - 0.1, 1 + 0.1, 0.01, -0.01], abs=1e-3)


def test_the_noise_of_the_kl_does_not_become_the_advantage_of_equal_scores():
    """Scores all 1, all 0 and mixed; 16 tokens with a noise of 0.02 nats each, at a coefficient of 0.05."""
    noise = torch.randn(24, 16, generator=torch.Generator().manual_seed(0)) * 0.02
    scores = torch.tensor([1.0] * 8 + [0.0] * 8 + [0.0, 1.0] * 4)
    advantages = group_relative_advantages(scores, 0.05 * noise.sum(1), groups=3)
    assert advantages.view(3, -1).square().mean(1).sqrt().tolist() == pytest.approx([0, 0, 1], abs=0.01)


@pytest.mark.parametrize("score", [0.1, 1 / 3, 4711.13])
def test_equal_scores_whose_mean_is_rounded_give_exactly_nothing(score):
    assert group_relative_advantages(torch.full((7,), score), torch.zeros(7), groups=1).tolist() == [0.0] * 7
    assert groups_of_equals(torch.tensor([score, score, score, 0.0]), groups=2).tolist() == [True, False]


def test_a_group_of_one_has_no_siblings_to_compare_with():
    with pytest.raises(ValueError, match="at least two"):
        leave_one_out_advantages(torch.ones(3), groups=3)


def test_explained_variance_of_a_perfect_and_of_a_constant_value():
    returns, mask = torch.tensor([[1.0, 2.0, 4.0]]), mask_of([3], 3)
    assert explained_variance(returns, returns, mask) == pytest.approx(1)
    assert explained_variance(torch.full((1, 3), 7 / 3), returns, mask) == pytest.approx(0, abs=1e-6)
    assert explained_variance(returns, torch.ones(1, 3), mask) == 0


def test_explained_variance_sees_values_that_are_all_off_by_as_much():
    returns, mask = torch.tensor([[1.0, 2.0, 3.0]]), mask_of([3], 3)
    variance = 2 / 3
    assert explained_variance(returns + 2, returns, mask) == pytest.approx(1 - 2**2 / variance)
