"""Reaching the model inside PEFT and DDP, and changing for a while how modules run."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel


def without_ddp(model: Any) -> Any:
    """The module inside DDP, or the model itself where DDP does not wrap it."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def inner_model(model: Any) -> PreTrainedModel:
    """The transformers model inside DDP and PEFT. Adapters stay injected in it. FSDP2 does not wrap the model."""
    model = without_ddp(model)
    return model.get_base_model() if isinstance(model, PeftModel) else model


def is_sharded(parameter: torch.Tensor) -> bool:
    """Whether the tensor is split over processes, as an FSDP2 DTensor or by DeepSpeed's ZeRO-3."""
    return hasattr(parameter, "full_tensor") or hasattr(parameter, "ds_id")


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace a module's forward inside the context. Its hooks still run."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


@contextmanager
def eval_mode(model: Any) -> Iterator[None]:
    """Eval mode inside the context: in training mode, gradient checkpointing would turn the KV cache off."""
    modes = [(module, module.training) for module in model.modules()] if isinstance(model, nn.Module) else []
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
