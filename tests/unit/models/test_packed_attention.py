"""Packed rows get the states of padded ones, where the kernel does what flash attention does."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from align.models import packed_attention
from align.models.packed_attention import packed_states, takes_packed_rows, use_packed_attention

SMALL = {
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def varlen(query, key, value, starts, _, longest, __, dropout, causal, debug, scale=None, **window):
    """Attention row by row, in the place of a kernel that needs a GPU."""
    rows = []
    for start, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        states = (each[start:end].transpose(0, 1)[None] for each in (query, key, value))
        place = torch.arange(end - start)
        distance = place[:, None] - place[None, :]
        seen = (distance >= 0) & (distance <= window.get("window_size_left", end))
        rows.append(
            torch.nn.functional.scaled_dot_product_attention(*states, attn_mask=seen, scale=scale, enable_gqa=True)
        )
    return (torch.cat([row[0].transpose(0, 1) for row in rows]),)


@pytest.fixture(autouse=True)
def kernel(monkeypatch):
    names = {name: getattr(torch, name) for name in dir(packed_attention.torch) if name != "ops"}
    ops = SimpleNamespace(aten=SimpleNamespace(_flash_attention_forward=varlen))
    monkeypatch.setattr(packed_attention, "torch", SimpleNamespace(**names, ops=ops))
    monkeypatch.setattr(packed_attention, "HALF_PRECISION", (torch.float32,))


def small(kind: str, **changes):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SMALL, **changes)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa").eval()


@pytest.mark.parametrize(("kind", "changes"), [("llama", {}), ("qwen3", {}), ("mistral", {"sliding_window": 3})])
def test_states_and_gradients_are_those_of_padded_rows(kind, changes) -> None:
    model = small(kind, **changes)
    ids = torch.randint(1, 120, (4, 9))
    mask = torch.ones_like(ids)
    mask[0, :4], mask[1, 7:], mask[3, 1:] = 0, 0, 0
    weights = torch.randn(4, 9, 32) * mask[..., None]

    def gradients(states):
        model.zero_grad()
        (states * weights).sum().backward()
        return torch.cat([each.grad.flatten() for each in model.base_model.parameters() if each.grad is not None])

    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    padded = model.base_model(input_ids=ids, attention_mask=mask, position_ids=positions).last_hidden_state
    expected = gradients(padded)
    assert use_packed_attention(model, torch.float32)
    assert takes_packed_rows(model.base_model)
    packed = packed_states(model.base_model, ids, mask)
    torch.testing.assert_close(packed, padded * mask[..., None], atol=1e-5, rtol=0)
    torch.testing.assert_close(gradients(packed), expected, atol=1e-4, rtol=1e-3)


def test_recomputed_activations_give_the_same_gradients() -> None:
    model = small("llama")
    assert use_packed_attention(model, torch.float32)
    ids, mask = torch.randint(1, 120, (3, 8)), torch.ones(3, 8, dtype=torch.long)
    mask[1, 5:] = 0

    def gradient():
        model.zero_grad()
        packed_states(model.base_model, ids, mask).square().sum().backward()
        return model.base_model.layers[0].mlp.up_proj.weight.grad.clone()

    kept = gradient()
    from align.rl.gpu_passes import recompute_activations

    recompute_activations(model)
    torch.testing.assert_close(gradient(), kept)
    assert not any(module.training for module in model.modules() if not hasattr(module, "gradient_checkpointing"))


def test_a_model_that_would_compute_something_else_keeps_its_own_attention(monkeypatch) -> None:
    model = small("llama")
    monkeypatch.setattr(packed_attention.torch.ops.aten, "_flash_attention_forward", lambda query, *_, **__: (query,))
    assert not use_packed_attention(model, torch.float32)
    assert model.config._attn_implementation == "sdpa"


def test_a_model_in_full_precision_keeps_its_own_attention(monkeypatch) -> None:
    monkeypatch.setattr(packed_attention, "HALF_PRECISION", (torch.bfloat16,))
    assert not use_packed_attention(small("llama"), torch.float32)
