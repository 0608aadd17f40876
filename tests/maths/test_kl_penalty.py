"""Every KL estimator that a recipe may name leads a table policy to its reference, by exact expectation."""

from itertools import pairwise
from typing import get_args

import pytest
import torch

from align.rl.advantages import kl_terms, penalised_rewards
from align.rl.losses import clipped_policy_loss, reference_kl_loss
from align.rl.settings import PpoBlock

ESTIMATORS = get_args(PpoBlock.model_fields["kl_estimator"].annotation)


def token_losses(estimator, logprobs, sampled, ref_logprobs):
    """(V, 1) what PPO minimises for each token of the vocabulary, with no score and a KL coefficient of 1."""
    mask = torch.ones_like(ref_logprobs, dtype=torch.bool)
    if estimator != "k1":
        rows = zip(logprobs, ref_logprobs, mask, strict=True)
        each = [reference_kl_loss(new[None], ref[None], one[None], estimator).loss for new, ref, one in rows]
        return torch.stack(each)[:, None]
    kl = kl_terms(sampled, ref_logprobs)["k1"]
    advantages = penalised_rewards(torch.zeros(len(kl)), kl, mask, kl_coef=1.0)
    rows = zip(logprobs, sampled, advantages, mask, strict=True)
    each = [clipped_policy_loss(new[None], old[None], gain[None], one[None], 0.2).loss for new, old, gain, one in rows]
    return torch.stack(each)[:, None]


def expected_gradient(estimator, logits, reference):
    """(V,) the gradient in the logits of the expected loss over tokens that the policy samples."""
    logits = logits.detach().requires_grad_()
    logprobs = logits.log_softmax(-1)[:, None]
    sampled = logprobs.detach()
    (sampled.exp() * token_losses(estimator, logprobs, sampled, reference[:, None])).sum().backward()
    return logits.grad


def divergence(logits, reference):
    logprobs = logits.log_softmax(-1)
    return float((logprobs.exp() * (logprobs - reference)).sum())


@pytest.fixture
def tables():
    """A policy's logits and a reference's log-probs over 20 tokens."""
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(20, generator=generator, dtype=torch.float64).log_softmax(-1)
    return reference + 1.5 * torch.randn(20, generator=generator, dtype=torch.float64), reference


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_without_a_score_the_exact_kl_falls(tables, estimator):
    logits, reference = tables
    course = [divergence(logits, reference)]
    for _ in range(300):
        logits = logits - expected_gradient(estimator, logits, reference)
        course.append(divergence(logits, reference))
    assert course[0] > 0.2
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(course))
    assert course[-1] < 0.1 * course[0]


@pytest.mark.parametrize("estimator", ["k1", "k2"])
def test_the_expected_gradient_of_k1_and_k2_is_that_of_the_kl_to_the_reference(tables, estimator):
    logits, reference = tables
    exact = logits.detach().requires_grad_()
    logprobs = exact.log_softmax(-1)
    (logprobs.exp() * (logprobs - reference)).sum().backward()
    assert torch.allclose(expected_gradient(estimator, logits, reference), exact.grad, atol=1e-12)


def test_the_expected_gradient_of_k3_is_that_of_the_kl_from_the_reference(tables):
    logits, reference = tables
    exact = logits.detach().requires_grad_()
    (reference.exp() * (reference - exact.log_softmax(-1))).sum().backward()
    assert torch.allclose(expected_gradient("k3", logits, reference), exact.grad, atol=1e-12)


@pytest.mark.parametrize(("estimator", "expected"), [("k2", 0.5), ("k3", 0.36788)])
def test_the_loss_of_a_token_one_nat_above_the_reference(estimator, expected):
    mask = torch.tensor([[True, False]])
    logprobs = torch.tensor([[-1.0, float("nan")]], requires_grad=True)
    result = reference_kl_loss(logprobs, torch.tensor([[-2.0, 0.0]]), mask, estimator)
    assert result.loss.item() == pytest.approx(expected, abs=1e-5)
    assert result.figures["kl_loss"].item() == pytest.approx(expected, abs=1e-5)


def test_a_token_that_the_reference_all_but_excludes_is_pushed_down_by_every_loss():
    for estimator in ("k2", "k3"):
        logprobs = torch.tensor([[-0.1]], requires_grad=True)
        reference_kl_loss(
            logprobs, torch.tensor([[-60.0]]), torch.ones(1, 1, dtype=torch.bool), estimator
        ).loss.backward()
        assert logprobs.grad.item() >= 0.99
