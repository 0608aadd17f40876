"""Values and gradients of chunked log-probabilities against those of the whole log-softmax."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from align.models.loading import load_causal_lm
from align.models.logprobs import completion_logprobs, gather_logprobs
from align.models.lora import add_lora
from align.settings.blocks import LoraBlock
from tests.tiny import build_tokenizer, tiny_config


def brute_force(hidden, weight, targets, temperature):
    logprobs = (hidden @ weight.T / temperature).log_softmax(-1)
    return logprobs.gather(-1, targets[..., None])[..., 0], -(logprobs.exp() * logprobs).sum(-1)


@given(
    shape=st.sampled_from([(7,), (2, 5), (1, 1), (3, 2, 2)]),
    chunk=st.integers(1, 9),
    temperature=st.floats(0.3, 2.0),
    seed=st.integers(0, 1000),
    frozen=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_values_and_gradients_equal_the_whole_softmax(shape, chunk, temperature, seed, frozen):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*shape, 6, generator=generator, requires_grad=True)
    weight = torch.randn(11, 6, generator=generator, requires_grad=not frozen)
    trained = (hidden,) if frozen else (hidden, weight)
    targets = torch.randint(11, shape, generator=generator)
    upstream = torch.randn(shape, generator=generator)
    expected, entropy = brute_force(hidden, weight, targets, temperature)
    expected_gradients = torch.autograd.grad((expected * upstream).sum(), trained)
    found = gather_logprobs(hidden, weight, targets, temperature, chunk_size=chunk)
    gradients = torch.autograd.grad((found.logprobs * upstream).sum(), trained)
    torch.testing.assert_close(found.logprobs, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.entropy, entropy, atol=1e-5, rtol=1e-4)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, wanted, atol=1e-4, rtol=1e-4)


def test_no_positions_give_empty_results_with_a_graph():
    hidden = torch.zeros(0, 6, requires_grad=True)
    found = gather_logprobs(hidden, torch.ones(11, 6), torch.zeros(0, dtype=torch.long))
    assert found.logprobs.shape == found.entropy.shape == (0,)
    found.logprobs.sum().backward()


def test_bf16_states_are_scored_in_float32():
    hidden, weight = torch.randn(4, 6).bfloat16(), torch.randn(11, 6).bfloat16()
    assert gather_logprobs(hidden, weight, torch.arange(4)).logprobs.dtype == torch.float32


def test_passes_with_and_without_gradients_agree_and_of_a_frozen_head_to_the_last_bit():
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(9, 6), torch.randn(11, 6), torch.arange(9)
    with torch.no_grad():
        without = gather_logprobs(hidden, weight, targets, 0.7, chunk_size=4)
    frozen = gather_logprobs(hidden.clone().requires_grad_(), weight, targets, 0.7, chunk_size=4)
    trained = gather_logprobs(hidden, weight.clone().requires_grad_(), targets, 0.7, chunk_size=4)
    assert torch.equal(frozen.logprobs, without.logprobs) and torch.equal(frozen.entropy, without.entropy)
    assert torch.allclose(trained.logprobs, without.logprobs, atol=1e-6)
    assert torch.allclose(trained.entropy, without.entropy, atol=1e-6)


def test_a_very_unlikely_token_keeps_its_log_probability():
    hidden, weight = torch.tensor([[200.0]]), torch.tensor([[1.0], [0.0], [-1.0]])
    with torch.no_grad():
        found = gather_logprobs(hidden, weight, torch.tensor([2]))
    assert found.logprobs.tolist() == [-400.0] and found.entropy.tolist() == [0.0]


@pytest.mark.parametrize("gradient", [False, True])
def test_temperature_zero_is_refused(gradient):
    states = torch.ones(2, 6, requires_grad=gradient)
    with pytest.raises(ValueError, match="temperature"):
        gather_logprobs(states, torch.ones(11, 6), torch.zeros(2, dtype=torch.long), 0.0)


@pytest.fixture
def model(tiny_model_dir):
    return load_causal_lm(str(tiny_model_dir), torch.float32)


PROMPTS = [[1, 40, 41, 42], [1, 90]]
COMPLETIONS = [[50, 51], [60, 61, 62]]


def padded(extra_left=0, extra_right=0):
    before, after = max(map(len, PROMPTS)) + extra_left, max(map(len, COMPLETIONS)) + extra_right
    ids, mask = torch.ones(2, before + after, dtype=torch.long), torch.zeros(2, before + after, dtype=torch.long)
    for row, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        start, end = before - len(prompt), before + len(completion)
        ids[row, start:end] = torch.tensor(prompt + completion)
        mask[row, start:end] = 1
    return ids, mask, after


@pytest.mark.parametrize("extra", [(0, 0), (3, 0), (0, 2), (5, 4)])
@pytest.mark.parametrize("chunk_size", [2, 256])
def test_padded_batch_equals_each_row_alone(model, extra, chunk_size):
    ids, mask, length = padded(*extra)
    with torch.no_grad():
        found = completion_logprobs(model, ids, mask, length, 0.7, chunk_size)
    assert found.logprobs.isfinite().all()
    for row, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1] / 0.7
        expected = logits.log_softmax(-1)
        wanted = expected.gather(-1, torch.tensor(completion)[:, None])[:, 0]
        torch.testing.assert_close(found.logprobs[row, : len(completion)], wanted, atol=1e-4, rtol=1e-4)
        entropy = -(expected.exp() * expected).sum(-1)
        torch.testing.assert_close(found.entropy[row, : len(completion)], entropy, atol=1e-4, rtol=1e-4)


def test_gradients_equal_those_of_the_whole_logits(model):
    ids, mask, length = padded(2, 1)
    counts = mask[:, -length:]
    model.zero_grad()
    (completion_logprobs(model, ids, mask, length, chunk_size=2).logprobs * counts).sum().backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(ids, attention_mask=mask, position_ids=positions).logits[:, -length - 1 : -1]
    whole = logits.log_softmax(-1).gather(-1, ids[:, -length:, None])[..., 0]
    (whole * counts).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all()
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-4, rtol=1e-3, msg=name)


def test_adapters_get_gradients(model):
    adapted = add_lora(model, LoraBlock(r=4))
    ids, mask, length = padded()
    completion_logprobs(adapted, ids, mask, length).logprobs.sum().backward()
    gradients = [p.grad.abs().sum() for name, p in adapted.named_parameters() if "lora_B" in name]
    assert all(gradient > 0 for gradient in gradients)


def test_head_is_restored(model):
    ids, mask, length = padded()
    before = model(ids).logits
    completion_logprobs(model, ids, mask, length)
    assert torch.equal(model(ids).logits, before)


def test_architecture_that_caps_its_logits_is_scored_by_its_own_logits():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = tiny_config(build_tokenizer()).to_dict()
    shared = {key: config[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    gemma = Gemma2ForCausalLM(
        Gemma2Config(**shared, num_attention_heads=4, num_key_value_heads=2, head_dim=16, final_logit_softcapping=0.05)
    ).eval()
    ids, mask, length = padded()
    with torch.no_grad():
        found = completion_logprobs(gemma, ids[:1], mask[:1], length).logprobs
        logits = gemma(ids[:1], attention_mask=mask[:1]).logits[:, -length - 1 : -1]
    assert logits.abs().max() <= 0.05
    torch.testing.assert_close(found, logits.log_softmax(-1).gather(-1, ids[:1, -length:, None])[..., 0])


@pytest.mark.parametrize("length", [0, 7])
def test_a_completion_must_be_shorter_than_the_sequence(model, length):
    ids, mask, _ = padded()
    with pytest.raises(ValueError, match="completion_length"):
        completion_logprobs(model, ids, mask, length)


BANDS = ((0.0, 0.5), (0.5, 0.9), (0.9, 0.99), (0.99, 0.999), (0.999, 0.9999))
TEMPERATURE = 0.7


def states_of_every_confidence() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """bf16 states (2000, H), weight (V, H) and targets, whose probabilities fall into every band."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(500, 64, generator=generator) / 8
    targets = torch.randint(500, (2000,), generator=generator)
    confidence = torch.linspace(0, 12, 2000)[:, None]
    states = confidence * weight[targets] + torch.randn(2000, 64, generator=generator)
    return states.bfloat16(), weight.bfloat16(), targets


def test_bf16_gradients_of_tokens_of_every_confidence_are_those_of_float64() -> None:
    states, weight, targets = states_of_every_confidence()
    exact = states.double().requires_grad_()
    logprobs = (exact @ weight.double().T / TEMPERATURE).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    logprobs.sum().backward()
    states.requires_grad_()
    gather_logprobs(states, weight, targets, TEMPERATURE).logprobs.sum().backward()
    assert exact.grad is not None
    assert states.grad is not None
    error = (states.grad.double() - exact.grad).norm(dim=-1) / exact.grad.norm(dim=-1)
    probabilities = logprobs.detach().exp()
    for low, high in BANDS:
        inside = (probabilities >= low) & (probabilities < high)
        assert inside.sum() >= 30, (low, high)
        assert error[inside].median() < 0.05, (low, high)
