"""Reaching into a model that PEFT or DDP wraps, while still calling it through its outermost forward."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel


def without_ddp(model: Any) -> Any:
    """The module that DDP wraps, or the model itself."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def inner_model(model: Any) -> PreTrainedModel:
    """The transformers model inside DDP and PEFT; adapters stay injected in it. FSDP2 wraps nothing."""
    model = without_ddp(model)
    return model.get_base_model() if isinstance(model, PeftModel) else model


def is_sharded(parameter: torch.Tensor) -> bool:
    """Whether processes hold parts of the tensor: FSDP2's DTensor, or a parameter that DeepSpeed's ZeRO-3 manages."""
    return hasattr(parameter, "full_tensor") or hasattr(parameter, "ds_id")


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let `module` compute something else while the context lasts; its hooks run as ever."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before
