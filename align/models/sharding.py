"""Precision and state of models whose weights FSDP2 or DeepSpeed shards over processes."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from align.run import processes


def set_precision(plugin: Any, dtype: torch.dtype) -> None:
    """Make FSDP2 gather weights in `dtype`, sum gradients in float32, and leave the model's outputs unchanged.

    With accelerate's own policy for bf16, FSDP2 would also round the outermost module's outputs to bf16, and so the
    scores, values and log-probabilities, which are float32 in every precision.

    Args:
        plugin: accelerate's FSDP plugin, before any module is wrapped.
    """
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    plugin.mixed_precision_policy = None if dtype == torch.float32 else policy


DEEPSPEED_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
"""The options that make DeepSpeed sum gradients in float32."""


def deepspeed_state(model: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """The whole state, on the CPU, of the submodule at `prefix` of a model that DeepSpeed shards.

    Call this in every process. Parameters are gathered one at a time, those that are trained in float32. Only the first
    process gets them; in the others, they are empty tensors.
    """
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_get_full_fp32_param

    buffers = dict(model.named_buffers())
    state = {name: tensor.cpu() for name, tensor in model.state_dict().items() if name in buffers}
    gathered: dict[int, Tensor] = {}  # tied parameters have several names
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name.startswith(prefix) and id(parameter) not in gathered:
            with GatheredParameters([parameter], enabled=not parameter.requires_grad):
                whole = safe_get_full_fp32_param(parameter) if parameter.requires_grad else parameter.data
                gathered[id(parameter)] = whole.cpu().clone() if processes.is_first() else torch.empty(0)
        if id(parameter) in gathered:
            state[name] = gathered[id(parameter)]
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
