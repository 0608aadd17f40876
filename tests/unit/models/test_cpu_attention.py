"""Attention by plain products equals PyTorch's own, and models use it only where it is faster."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from align.models.cpu_attention import MAX_SHORT_POSITIONS, _PlainAttention, use_cpu_attention
from align.models.loading import load_causal_lm


def inputs(length, positions, dtype=torch.float64):
    torch.manual_seed(0)
    query = torch.randn(2, 4, length, 8, dtype=dtype, requires_grad=True)
    key, value = (torch.randn(2, 2, positions, 8, dtype=dtype, requires_grad=True) for _ in range(2))
    mask = torch.ones(length, positions, dtype=torch.bool).tril(positions - length).repeat(2, 1, 1, 1)
    mask[0, :, :, :2] = False
    return query, key, value, mask


def slopes(result, *inputs):
    weights = torch.linspace(-1, 1, result.numel(), dtype=result.dtype).view(result.shape)
    return torch.autograd.grad((result * weights).sum(), inputs)


@pytest.mark.parametrize("length", [3, 6])
def test_plain_products_are_pytorchs_attention(length):
    query, key, value, mask = inputs(length, 6)
    mask[..., -1] = True  # every query attends to something
    plain = _PlainAttention.apply(query, key, value, mask, 0.3)
    repeated = (states.repeat_interleave(2, dim=1) for states in (key, value))
    expected = scaled_dot_product_attention(query, *repeated, attn_mask=mask, scale=0.3)
    assert torch.allclose(plain, expected, atol=1e-6)
    found, wanted = slopes(plain, query, key, value), slopes(expected, query, key, value)
    assert all(torch.allclose(one, two, atol=1e-6) for one, two in zip(found, wanted, strict=True))


def test_queries_that_attend_to_nothing_stay_finite():
    query, key, value, mask = inputs(3, 6)
    mask[:] = False
    result = _PlainAttention.apply(query, key, value, mask, 0.3)
    assert all(numbers.isfinite().all() for numbers in (result, *slopes(result, query, key, value)))


@pytest.mark.parametrize(
    ("dtype", "width", "grad", "used"),
    [
        (torch.bfloat16, 12, True, True),
        (torch.bfloat16, 12, False, False),
        (torch.float32, 12, True, False),
        (torch.bfloat16, MAX_SHORT_POSITIONS + 1, True, False),
    ],
)
def test_a_model_uses_plain_products_where_they_are_faster(tiny_model_dir, monkeypatch, dtype, width, grad, used):
    model = load_causal_lm(str(tiny_model_dir), dtype)
    use_cpu_attention(model)
    calls = []
    apply = _PlainAttention.apply
    monkeypatch.setattr(_PlainAttention, "apply", lambda *given: calls.append(1) or apply(*given))
    ids = torch.arange(width)[None] % 200 + 20
    mask = torch.ones_like(ids)
    mask[:, :2] = 0
    with torch.set_grad_enabled(grad):
        logits = model(input_ids=ids, attention_mask=mask).logits
    assert bool(calls) == used
    plain = load_causal_lm(str(tiny_model_dir), dtype)(input_ids=ids, attention_mask=mask).logits
    assert torch.allclose(logits[:, 2:].float(), plain[:, 2:].float(), atol=0.05)
