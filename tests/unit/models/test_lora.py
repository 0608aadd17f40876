"""New adapters, fused LoRA layers against PEFT's own forward, and merges that keep a small adapter."""

import pytest
import torch
from peft.tuners.lora import Linear as LoraLinear

from align.errors import InputError
from align.models.loading import load_causal_lm
from align.models.lora import add_lora, dithered, fuse_adapters, merged_weights
from align.settings.blocks import LoraBlock


def adapted(tiny_model_dir, fused, std=0.2):
    torch.manual_seed(0)
    model = add_lora(load_causal_lm(str(tiny_model_dir), torch.float32), LoraBlock(r=4, alpha=8))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std)
    assert not fused or fuse_adapters(model)
    return model


def outcome(model, adapters=True):
    ids = torch.arange(20, 44).view(2, 12)
    if not adapters:
        model.disable_adapter_layers()
    logits = model(input_ids=ids).logits
    if adapters:
        logits.log_softmax(-1)[..., 7].sum().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def test_outputs_and_gradients_are_those_of_peft(tiny_model_dir):
    logits, gradients = outcome(adapted(tiny_model_dir, fused=True))
    expected, expected_gradients = outcome(adapted(tiny_model_dir, fused=False))
    assert torch.allclose(logits, expected, atol=1e-5)
    assert gradients.keys() == expected_gradients.keys() and len(gradients) == 28
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        assert torch.allclose(gradient, expected_gradients[name], atol=1e-4, rtol=1e-4), name


def test_without_adapters_a_fused_layer_is_its_base_layer(tiny_model_dir):
    fused, _ = outcome(adapted(tiny_model_dir, fused=True), adapters=False)
    alone = load_causal_lm(str(tiny_model_dir), torch.float32)(input_ids=torch.arange(20, 44).view(2, 12)).logits
    assert torch.equal(fused, alone)


def test_layers_with_dropout_are_left_to_peft(tiny_model_dir):
    model = adapted(tiny_model_dir, fused=False)
    layer = next(module for module in model.modules() if isinstance(module, LoraLinear))
    layer.lora_dropout["default"] = torch.nn.Dropout(0.1)
    assert not fuse_adapters(model)
    assert "forward" not in vars(layer)


@pytest.mark.parametrize("std", [2e-6, 2e-5, 2e-4])
def test_a_merge_in_bf16_moves_weights_by_the_adapter_on_average(std):
    """Measured by projection on the added delta, most of which rounding to the nearest loses where it is small."""
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(1000, 1000, generator=generator) * 0.05).bfloat16()
    delta = torch.randn(1000, 1000, generator=generator) * std
    noise = torch.randint(1 << 16, (weight.numel(),), dtype=torch.int32, generator=generator)

    def kept(merged):
        return float(((merged.float() - weight.float()) * delta).sum() / delta.square().sum())

    assert kept(dithered(weight.float() + delta, noise)) == pytest.approx(1, abs=6e-6 / std if std < 1e-5 else 0.15)
    if std < 1e-5:
        assert kept((weight.float() + delta).bfloat16()) < 0.2


def test_dithering_returns_only_neighbours_in_bf16():
    values = torch.tensor([1.0, 1.0 + 2**-9, -1.0 - 2**-9, 3.0])
    for number in (0, 1 << 14, (1 << 16) - 1):
        rounded = dithered(values, torch.full((4,), number, dtype=torch.int32)).float()
        assert rounded[0] == 1 and rounded[3] == 3
        assert abs(rounded[1]) in (1.0, 1.0 + 2**-7) and rounded[2] == -rounded[1]


def test_a_merge_depends_only_on_its_weights(tiny_model_dir):
    model = adapted(tiny_model_dir, fused=True).to(torch.bfloat16)
    layers = [module for module in model.modules() if isinstance(module, LoraLinear)]
    first, second = merged_weights(layers, "default"), merged_weights(layers, "default")
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))
    assert {weight.dtype for weight in first} == {torch.bfloat16}


def load(directory, dtype=torch.float32):
    return load_causal_lm(str(directory), dtype)


def logits(model):
    with torch.no_grad():
        return model(torch.tensor([[1, 40, 41, 42, 43]])).logits


def test_new_adapter_changes_nothing_and_trains_in_fp32(tiny_model_dir):
    plain = load(tiny_model_dir, torch.bfloat16)
    before = logits(plain)
    model = add_lora(plain, LoraBlock(r=4))
    assert torch.equal(logits(model), before)
    trained = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}
    assert trained and set(trained.values()) == {torch.float32}
    assert all("lora_" in name for name in trained)


def test_second_adapter_is_added_beside_the_first(tiny_model_dir):
    model = adapted(tiny_model_dir, fused=False)
    before = logits(model)
    assert add_lora(model, LoraBlock(r=2), adapter_name="value") is model
    assert set(model.peft_config) == {"default", "value"}
    assert torch.equal(logits(model), before)


def test_unknown_target_modules_are_refused(tiny_model_dir):
    with pytest.raises(InputError, match=r"model\.lora\.target_modules"):
        add_lora(load(tiny_model_dir), LoraBlock(target_modules=("no_such_layer",)))


def test_embeddings_cannot_be_adapted(tiny_model_dir):
    with pytest.raises(InputError, match="embeddings"):
        add_lora(load(tiny_model_dir), LoraBlock(target_modules=("embed_tokens",)))
