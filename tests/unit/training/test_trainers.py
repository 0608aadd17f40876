"""The loss against soft labels."""

import math

import pytest
import torch

from align.training.trainers import soft_label_loss


def test_soft_label_loss_by_hand() -> None:
    margin = torch.tensor([0.0, 2.0, -1.0, 2.0])
    probability = torch.tensor([0.5, 1.0, 0.75, 0.6])

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    expected = [
        math.log(2),
        -math.log(sigmoid(2)),
        -(0.75 * math.log(sigmoid(-1)) + 0.25 * math.log(sigmoid(1))),
        -(0.6 * math.log(sigmoid(2)) + 0.4 * math.log(sigmoid(-2))),
    ]
    torch.testing.assert_close(soft_label_loss(margin, probability), torch.tensor(expected))


@pytest.mark.parametrize("probability", [0.5, 0.6, 0.9])
def test_soft_label_loss_is_least_where_the_model_says_the_label(probability: float) -> None:
    label = torch.tensor([probability])
    best = torch.logit(label)
    least = soft_label_loss(best, label)
    assert soft_label_loss(best + 0.1, label) > least
    assert soft_label_loss(best - 0.1, label) > least


def test_soft_label_loss_stays_finite_at_huge_margins() -> None:
    margin = torch.tensor([1e4, -1e4], requires_grad=True)
    loss = soft_label_loss(margin, torch.tensor([0.9, 0.9]))
    torch.testing.assert_close(loss.detach(), torch.tensor([1e3, 9e3]))
    loss.sum().backward()
    assert margin.grad is not None
    torch.testing.assert_close(margin.grad, torch.tensor([0.1, -0.9]))
