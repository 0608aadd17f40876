"""PPO's losses against figures worked by hand, gradients by finite differences, and additivity."""

import math

import pytest
import torch

from align.rl.losses import clipped_policy_loss, clipped_value_loss

ONE = torch.ones(1, 1, dtype=torch.bool)


def policy_loss(ratio: float, advantage: float, clip_range: float = 0.2):
    return clipped_policy_loss(
        torch.tensor([[math.log(ratio)]]), torch.zeros(1, 1), torch.tensor([[advantage]]), ONE, clip_range
    )


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected", "clipped"),
    [
        (1.0, 2.0, -2.0, 0),
        (1.5, 2.0, -2.4, 1),  # a gain is held at 1 + clip
        (0.5, 2.0, -1.0, 0),  # a loss of a good action is not
        (0.5, -2.0, 1.6, 1),
        (1.5, -2.0, 3.0, 0),
    ],
)
def test_policy_loss_worked_by_hand(ratio, advantage, expected, clipped):
    result = policy_loss(ratio, advantage)
    assert result.loss.item() == pytest.approx(expected, rel=1e-5)
    assert result.figures["clip_fraction"].item() == clipped


def test_policy_gradient_at_ratio_one_is_minus_the_advantage():
    logprobs = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    advantages = torch.tensor([[0.5, -3.0]])
    clipped_policy_loss(
        logprobs, logprobs.detach(), advantages, torch.ones(1, 2, dtype=torch.bool), 0.2
    ).loss.backward()
    assert torch.allclose(logprobs.grad, -advantages)


def test_no_gradient_flows_through_a_clipped_ratio():
    logprobs = torch.tensor([[math.log(1.5)]], requires_grad=True)
    clipped_policy_loss(logprobs, torch.zeros(1, 1), torch.ones(1, 1), ONE, 0.2).loss.backward()
    assert logprobs.grad.item() == 0


def test_masked_tokens_change_nothing_even_when_they_are_not_finite():
    mask = torch.tensor([[True, False]])
    result = clipped_policy_loss(
        torch.tensor([[0.1, float("nan")]]), torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]), mask, 0.2
    )
    alone = clipped_policy_loss(torch.tensor([[0.1]]), torch.zeros(1, 1), torch.ones(1, 1), ONE, 0.2)
    assert result.loss == alone.loss and result.figures["kl_to_old_k3"] == alone.figures["kl_to_old_k3"]


def test_an_enormous_log_ratio_stays_finite():
    result = clipped_policy_loss(torch.tensor([[500.0]]), torch.zeros(1, 1), -torch.ones(1, 1), ONE, 0.2)
    assert result.loss.isfinite() and result.figures["largest_log_ratio"] == 20


def test_losses_of_micro_batches_add_up_to_the_whole_batch():
    generator = torch.Generator().manual_seed(1)
    new, old, advantages, values, returns = torch.randn(5, 6, 4, generator=generator)
    mask = torch.arange(4)[None, :] < torch.tensor([4, 1, 2, 3, 4, 1])[:, None]
    whole = clipped_policy_loss(new, old, advantages, mask, 0.2).loss
    parts = [clipped_policy_loss(new[i:j], old[i:j], advantages[i:j], mask[i:j], 0.2).loss for i, j in [(0, 1), (1, 6)]]
    assert torch.allclose(whole, sum(parts))
    whole = clipped_value_loss(values, old, returns, mask, 0.2).loss
    parts = [clipped_value_loss(values[i:j], old[i:j], returns[i:j], mask[i:j], 0.2).loss for i, j in [(0, 4), (4, 6)]]
    assert torch.allclose(whole, sum(parts))


@pytest.mark.parametrize(
    ("value", "expected", "clipped"),
    [
        (0.1, 0.5 * 0.9**2, 0),  # within the range of the old value 0
        (0.5, 0.5 * 0.8**2, 1),  # held at 0.2, which is the worse of the two
        (-0.5, 0.5 * 1.5**2, 0),  # further from the target than the held value: counts in full
    ],
)
def test_value_loss_worked_by_hand(value, expected, clipped):
    result = clipped_value_loss(torch.tensor([[value]]), torch.zeros(1, 1), torch.ones(1, 1), ONE, 0.2)
    assert result.loss.item() == pytest.approx(expected, rel=1e-5)
    assert result.figures["value_clip_fraction"].item() == clipped


def test_without_value_clipping_the_loss_is_half_the_squared_error():
    values, returns = torch.randn(2, 3), torch.randn(2, 3)
    result = clipped_value_loss(values, torch.zeros(2, 3), returns, torch.ones(2, 3, dtype=torch.bool), float("inf"))
    assert torch.allclose(result.loss, 0.5 * (values - returns).square().sum())
