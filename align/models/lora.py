"""LoRA adapters: adding them to a model, merging them, and computing them in fewer operations than PEFT does.

PEFT calls a module for each factor, scales and adds the results in separate operations, and casts every input to the
adapters' float32 and back. Here, a single autograd function computes the layer. For the backward pass it keeps only the
input and the N x r product. It computes with the factors in the frozen weights' dtype, while the parameters and their
gradients stay float32.

Shapes: N positions, I input and O output features, r the adapter's rank.
"""

from collections.abc import Sequence
from types import MethodType
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from align.errors import InputError, first_line
from align.models.wrappers import is_sharded
from align.settings.blocks import LoraBlock


def add_lora(
    model: nn.Module, lora: LoraBlock, task_type: str = "CAUSAL_LM", adapter_name: str = "default"
) -> PeftModel:
    """Add an adapter to a model and freeze the model's weights. All trainable parameters become fp32.

    On a model that already has adapters this adds another, which stays inactive until `set_adapter`. A classifier's
    score head (`task_type="SEQ_CLS"`) is trained in full, beside the adapter.

    Raises:
        InputError: `target_modules` matches nothing in this model, or layers that are not linear.
    """
    targets = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    config = LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, target_modules=targets, lora_dropout=0.0, bias="none", task_type=task_type
    )
    try:
        if isinstance(model, PeftModel):
            model.add_adapter(adapter_name, config)
            peft_model = model
        else:
            peft_model = get_peft_model(model, config, adapter_name=adapter_name)
    except ValueError as error:
        raise InputError(f"model.lora.target_modules: {first_line(error)}") from error
    for name, parameter in peft_model.named_parameters():
        if "lora_embedding_" in name:
            raise InputError("model.lora.target_modules: embeddings cannot be adapted; name linear layers only")
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return peft_model


class _AdaptedLinear(torch.autograd.Function):
    """x Wᵀ + b + s (x Aᵀ) Bᵀ with W and b frozen (Hu et al. 2021, section 4.1)."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scaling: float
    ) -> Tensor:
        flat = inputs.reshape(-1, inputs.shape[-1])  # (N, I)
        down, up = down.to(weight.dtype), up.to(weight.dtype)
        narrow = flat @ down.T  # (N, r)
        result = nn.functional.linear(flat, weight, bias).addmm_(narrow, up.T, alpha=scaling)
        ctx.save_for_backward(flat, weight, down, up, narrow)
        ctx.scaling = scaling
        return result.reshape(*inputs.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, Tensor, Tensor, None]:
        flat, weight, down, up, narrow = ctx.saved_tensors
        slope = gradient.reshape(-1, gradient.shape[-1])  # (N, O)
        narrow_slope = (slope @ up).mul_(ctx.scaling)  # (N, r)
        of_inputs = None
        if ctx.needs_input_grad[0]:
            of_inputs = (slope @ weight).addmm_(narrow_slope, down).reshape(*gradient.shape[:-1], -1)
        of_up = (slope.T @ narrow).float().mul_(ctx.scaling)
        return of_inputs, None, None, (narrow_slope.T @ flat).float(), of_up, None


def merged_weights(layers: Sequence[Any], adapter: str) -> list[Tensor]:
    """(O, I) the merged weight W + s B A of each fused layer, in W's dtype. A cast to bf16 is dithered."""
    weights = [layer.get_base_layer().weight.data for layer in layers]
    noise = dither(max(weight.numel() for weight in weights), weights[0].device)
    merged = []
    for layer, weight in zip(layers, weights, strict=True):
        up, down = layer.lora_B[adapter].weight.data, layer.lora_A[adapter].weight.data
        whole = torch.addmm(weight.float(), up.float(), down.float(), alpha=layer.scaling[adapter])
        dithers = weight.dtype == torch.bfloat16
        merged.append(dithered(whole, noise[: whole.numel()]) if dithers else whole.to(weight.dtype))
    return merged


def dithered(values: Tensor, noise: Tensor) -> Tensor:
    """Cast float32 to bf16 by stochastic rounding: the nearer the upper neighbour, the likelier a number is rounded up.

    Rounding to the nearest would leave a bf16 weight unchanged whenever less than half a bf16 step is added to it, and
    so erase a small adapter. Dithering keeps the adapter on average.

    Args:
        noise: as many int32 numbers from 0 to 2^16 - 1 as there are values.
    """
    bits = values.contiguous().view(torch.int32)
    return (bits + noise.view(values.shape)).bitwise_and_(~0xFFFF).view(torch.float32).to(torch.bfloat16)


def dither(count: int, device: torch.device) -> Tensor:
    """Noise for `dithered`. It is the same each time, so that a merge depends only on its weights."""
    generator = torch.Generator(device).manual_seed(0)
    return torch.randint(1 << 16, (count,), dtype=torch.int32, device=device, generator=generator)


def fuse_adapters(model: nn.Module) -> bool:
    """Make a model's LoRA layers compute with the single function. Returns False, and changes none, if any is not a
    plain linear layer.

    Call this after adding all adapters. Layers with sharded weights still use PEFT's forward: hooks on its modules
    gather the weights, and the single function does not call those modules.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    if not all(_is_plain(layer) for layer in layers):
        return False
    for layer in layers:
        layer.forward = MethodType(_forward, layer)
    return True


def _is_plain(layer: Any) -> bool:
    return (
        type(layer) is LoraLinear
        and type(layer.get_base_layer()) is nn.Linear
        and not layer.lora_variant
        and not any(layer.lora_bias.values())
        and all(getattr(dropout, "p", 0.0) == 0 for dropout in layer.lora_dropout.values())
    )


def _forward(layer: Any, inputs: Tensor) -> Tensor:
    adapter, base = layer._active_adapter[0], layer.get_base_layer()
    if layer._disable_adapters or adapter not in layer.lora_A:
        return base(inputs)
    if is_sharded(base.weight):
        return LoraLinear.forward(layer, inputs)
    return _AdaptedLinear.apply(
        inputs.to(base.weight.dtype),
        base.weight,
        base.bias,
        layer.lora_A[adapter].weight,
        layer.lora_B[adapter].weight,
        layer.scaling[adapter],
    )
