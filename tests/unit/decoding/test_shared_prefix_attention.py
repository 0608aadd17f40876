"""Attention to a shared prefix and to a row's own states, against attention to both in one row."""

from types import SimpleNamespace

import pytest
import torch

from align.decoding.prefix_cache import CachedPrefix
from align.decoding.shared_prefix_attention import attending_to_prefix, can_attend_to_prefix, shared_prefix_attention
from align.models.loading import load_causal_lm

ROWS, GROUPS, HEADS, SIZE, PREFIX, OWN = 5, 2, 6, 16, 40, 9


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_parts_merge_into_the_softmax_over_all_positions(dtype, tolerance):
    torch.manual_seed(0)
    query = (3 * torch.randn(ROWS, HEADS, 1, SIZE)).to(dtype)
    first = torch.randn(2, GROUPS, PREFIX, SIZE).to(dtype)
    own = torch.randn(2, ROWS, GROUPS, OWN, SIZE).to(dtype)
    mask = torch.arange(OWN) >= torch.tensor([0, 3, 8, 5, 1])[:, None]
    has_prefix = torch.tensor([True, True, True, False, True])

    config = SimpleNamespace(_attn_implementation="sdpa")
    module = SimpleNamespace(layer_idx=0)
    with attending_to_prefix(config, CachedPrefix((1,) * PREFIX, [(first[0], first[1])]), has_prefix):
        assert config._attn_implementation == "shared_prefix"
        found, _ = shared_prefix_attention(module, query, own[0], own[1], mask[:, None, None])
    assert config._attn_implementation == "sdpa"

    keys, values = (
        torch.cat([of[None].expand(ROWS, -1, -1, -1), its], dim=2).repeat_interleave(HEADS // GROUPS, dim=1).double()
        for of, its in zip(first, own, strict=True)
    )
    seen = torch.cat([has_prefix[:, None].expand(-1, PREFIX), mask], dim=1)
    scores = (query.double() @ keys.mT / SIZE**0.5).masked_fill(~seen[:, None, None], -torch.inf)
    expected = (scores.softmax(-1) @ values).transpose(1, 2)  # (B, 1, H, D)
    assert found.shape == expected.shape
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)


def test_models_that_the_kernel_does_not_support_keep_their_own_attention(tiny_model_dir, monkeypatch):
    model = load_causal_lm(str(tiny_model_dir), torch.float32)
    prefix = CachedPrefix((1, 2), [(torch.zeros(2, 2, 4), torch.zeros(2, 2, 4))])
    assert can_attend_to_prefix(model, prefix)
    assert not can_attend_to_prefix(model, CachedPrefix((1, 2), [(torch.zeros(2, 2, 4), torch.zeros(2, 2, 8))]))
    with monkeypatch.context() as patch:
        patch.setattr(model.config, "rope_parameters", None)
        assert not can_attend_to_prefix(model, prefix)
    model.set_attn_implementation("eager")
    assert not can_attend_to_prefix(model, prefix)
