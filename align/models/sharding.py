"""What models need whose weights are spread over processes by FSDP2 or DeepSpeed, whoever trains them."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from align.run import processes


def set_precision(plugin: Any, dtype: torch.dtype) -> None:
    """Have FSDP2 gather weights in `dtype`, add up gradients in float32, and leave a model's results as they are.

    By accelerate's own policy for bf16 it would round what the outermost module returns, and with it scores, values and
    log-probs, which are float32 whatever they are computed in.

    Args:
        plugin: accelerate's, before anything is wrapped with it.
    """
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    plugin.mixed_precision_policy = None if dtype == torch.float32 else policy


DEEPSPEED_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
"""DeepSpeed's options by which it adds up gradients in float32."""


def deepspeed_state(model: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """The whole state of the submodule whose names start so, where DeepSpeed holds the model in shards.

    What is trained is float32, one parameter gathered at a time, on the CPU of the first process; in the others such
    tensors are empty. Call it in every process.
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
