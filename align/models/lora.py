"""LoRA layers of a frozen trunk, computed in fewer and larger operations than PEFT's own forward.

Shapes: N positions, I and O features in and out, r the adapter's rank.

PEFT calls a module for each factor, scales and adds the result in operations of their own, and casts every input to
the adapters' float32 and back. One autograd function does without: it keeps the input and the N x r product for the
backward pass and nothing else. Factors are computed in the trunk's dtype; the parameters and their gradients stay
float32.
"""

from collections.abc import Sequence
from types import MethodType
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from align.models.wrappers import is_sharded


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
    """(O, I) W + s B A of each fused layer in W's dtype; bf16 is dithered."""
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
    """float32 to bf16, each number rounded up as often as it is near the upper neighbour.

    Rounding to the nearest would give a bf16 weight back as it was whenever what is added is less than half a step of
    bf16, so that a small adapter would vanish whole; dithered, it is there on average.

    Args:
        noise: as many int32 numbers from 0 to 2^16 - 1.
    """
    bits = values.contiguous().view(torch.int32)
    return (bits + noise.view(values.shape)).bitwise_and_(~0xFFFF).view(torch.float32).to(torch.bfloat16)


def dither(count: int, device: torch.device) -> Tensor:
    """Noise for `dithered`: the same each time, so that a merge is a function of its weights."""
    generator = torch.Generator(device).manual_seed(0)
    return torch.randint(1 << 16, (count,), dtype=torch.int32, device=device, generator=generator)


def fuse_adapters(model: nn.Module) -> bool:
    """Let a model's LoRA layers compute so; False, and nothing done, where some of them are not plain linear ones.

    Call it once all adapters are there. Layers whose weights are sharded go on as PEFT has them: they are gathered by
    hooks on the modules that the function does without.
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
        return base(inputs)  # type: ignore[no-any-return]
    if is_sharded(base.weight):
        return LoraLinear.forward(layer, inputs)  # type: ignore[no-any-return]
    result: Tensor = _AdaptedLinear.apply(
        inputs.to(base.weight.dtype),
        base.weight,
        base.bias,
        layer.lora_A[adapter].weight,
        layer.lora_B[adapter].weight,
        layer.scaling[adapter],
    )
    return result
