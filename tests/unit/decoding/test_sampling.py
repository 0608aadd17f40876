"""Sampling against worked distributions."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from align.decoding import sampling
from align.decoding.sampling import sample
from align.errors import NotFinite


def test_samples_follow_the_distribution():
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log().expand(4000, 4)
    uniforms = (np.arange(4000) + 0.5) / 4000
    tokens, logprobs = sample(logits, uniforms, 1.0, 1.0)
    assert torch.bincount(tokens, minlength=4).tolist() == [2000, 1000, 500, 500]
    assert logprobs.exp().tolist() == pytest.approx(logits.exp().gather(-1, tokens[:, None])[:, 0].tolist())


def test_temperature_sharpens_the_distribution():
    logits = torch.tensor([0.8, 0.2]).log().expand(1700, 2)
    tokens, _ = sample(logits, (np.arange(1700) + 0.5) / 1700, 0.5, 1.0)
    assert torch.bincount(tokens).tolist() == [1600, 100]  # 0.8² : 0.2² = 16 : 1


@given(
    weights=st.lists(st.floats(0.01, 1.0), min_size=2, max_size=12),
    top_p=st.floats(0.05, 0.99),
    uniform=st.floats(0, 1, exclude_max=True),
)
@settings(max_examples=150, deadline=None)
def test_nucleus_is_the_smallest_set_with_the_mass(weights, top_p, uniform):
    probabilities = torch.tensor(weights) / sum(weights)
    tokens, _ = sample(probabilities.log()[None], np.array([uniform]), 1.0, top_p)
    token = int(tokens[0])
    likelier = float(sum(p for p in probabilities if p > probabilities[token]))
    assert likelier < top_p + 1e-5


def test_nucleus_wider_than_the_candidates_sorts_everything(monkeypatch):
    monkeypatch.setattr(sampling, "NUCLEUS_CANDIDATES", 2)
    logits = torch.zeros(1000, 10)
    tokens, _ = sample(logits, (np.arange(1000) + 0.5) / 1000, 1.0, 0.75)
    assert sorted(torch.bincount(tokens, minlength=10).tolist()) == [0, 0] + [125] * 8


@pytest.mark.parametrize("uniform", [0.0, np.nextafter(1.0, 0.0)])
def test_a_token_without_probability_is_never_sampled(uniform):
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]])
    tokens, _ = sample(logits, np.array([uniform]), 1.0, 1.0)
    assert tokens.item() == (1 if uniform == 0.0 else 2)


def test_logits_that_are_not_numbers_stop_the_run():
    with pytest.raises(NotFinite, match="not finite"):
        sample(torch.tensor([[0.0, torch.nan]]), np.array([0.5]), 1.0, 1.0)


@pytest.mark.parametrize("rows", [1, 3])
def test_torchs_deterministic_mode_draws_the_same_tokens_and_stays_on(rows):
    logits = torch.randn(rows, 50)
    uniforms = np.linspace(0.1, 0.9, rows)
    free = [sample(logits.clone(), uniforms, 1.0, top_p) for top_p in (1.0, 0.5)]
    torch.use_deterministic_algorithms(True)
    try:
        bound = [sample(logits.clone(), uniforms, 1.0, top_p) for top_p in (1.0, 0.5)]
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    for (tokens, logprobs), (same, logprobs_again) in zip(free, bound, strict=True):
        assert torch.equal(tokens, same)
        assert torch.equal(logprobs, logprobs_again)
