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
from peft.tuners.lora import LoraLayer, ParamWrapper
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from align.errors import InputError, first_line
from align.models.wrappers import inner_model, is_sharded
from align.settings.blocks import LoraBlock

MERGEABLE = (LoraLinear, ParamWrapper)
"""PEFT's layers for linear layers and for experts: those whose adapters `lora_delta` can merge."""


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
        r=lora.r,
        lora_alpha=lora.alpha,
        target_modules=targets,
        exclude_modules=_other_towers(inner_model(model)) if targets == "all-linear" else None,
        lora_dropout=0.0,
        bias="none",
        task_type=task_type,
    )
    try:
        if isinstance(model, PeftModel):
            model.add_adapter(adapter_name, config)
            peft_model = model
        else:
            peft_model = get_peft_model(model, config, adapter_name=adapter_name)
    except ValueError as error:
        raise InputError(f"model.lora.target_modules: {first_line(error)}") from error
    for name, layer in peft_model.named_modules():
        if isinstance(layer, LoraLayer) and type(layer) not in MERGEABLE:
            raise InputError(
                f"model.lora.target_modules: {name} is a {type(layer.get_base_layer()).__name__}, whose adapter cannot "
                "be merged into the saved model (embeddings and quantized weights cannot); name linear layers only"
            )
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return peft_model


def _other_towers(model: Any) -> str | None:
    """A pattern of the modules beside a multimodal model's text decoder: its vision and audio towers and projectors.

    They see no input here, so adapters on them would get no gradient. None for models of text alone.
    """
    decoder = model.get_decoder() if isinstance(model, PreTrainedModel) else None
    beside = [
        name
        for name, child in (model.base_model.named_children() if decoder is not None else ())
        if decoder is not model.base_model and all(module is not decoder for module in child.modules())
    ]
    towers = [name for name in beside if any(True for _ in model.base_model.get_submodule(name).parameters())]
    return rf"(.*\.)?({'|'.join(towers)})(\..*)?" if towers else None


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


def lora_delta(layer: Any, down: Tensor, up: Tensor, adapter: str) -> Tensor:
    """s B A in float32, in the shape of the layer's weight, which is (E, O, I) or (E, I, O) for E experts.

    Args:
        layer: PEFT's. Its own factors may be shards, so it only tells the shapes.
        down, up: the whole factors A and B. For experts, PEFT stacks them: A is (E r, I), and B is (O, r E) with the
            experts innermost.
    """
    up, down, scaling = up.float(), down.float(), layer.scaling[adapter]
    if not isinstance(layer, ParamWrapper) or layer.num_experts == 1:
        delta = up @ down * scaling
        return delta.T if layer.fan_in_fan_out else delta
    of_experts = down.reshape(layer.num_experts, -1, down.shape[-1]), up.reshape(len(up), -1, layer.num_experts)
    delta = torch.einsum("eri,ore->eoi", *of_experts) * scaling
    return delta if layer._did_swap_in_out_features else delta.mT


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
