"""How gradients become optimizer steps, and where parameters and optimizer state live.

`Updates` is accelerate with PyTorch's own optimizer: one process, DDP or FSDP2. `DeepSpeedUpdates` is a DeepSpeed
engine, which accumulates, clips and steps by itself. The PPO loop sees no difference.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from align import processes
from align.config import OptimizerBlock

ADAM_BETAS, ADAM_EPS = (0.9, 0.999), 1e-5
"""As in Ouyang et al.'s code; the larger epsilon keeps early steps small (Huang et al. 2024)."""
STATE = "state.pt"
_TRAINED = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True, strict=False)


class Updates:
    """The trained parameters of `models` and their AdamW, under accelerate.

    `wrapped` is for passes with a gradient. Passes without go through `models`, around DDP: it would broadcast buffers,
    and processes may differ in their passes.
    """

    skips_allowed = 5
    """Steps in a row that may be left out because their gradient is not finite."""

    def __init__(self, accelerator: Accelerator, models: Any, options: OptimizerBlock) -> None:
        self.accelerator = accelerator
        self.options = options
        if accelerator.is_fsdp2:
            _keep_results_unrounded(accelerator.state.fsdp_plugin)
        self.wrapped, self.optimizer = accelerator.prepare(models, adamw(models, options))
        self.models = accelerator.unwrap_model(self.wrapped)
        self.sharded = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)

    @property
    def learning_rate(self) -> float:
        """The rate of the next step."""
        return float(self.optimizer.param_groups[0]["lr"])

    @learning_rate.setter
    def learning_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def accumulate(self, *, last: bool) -> AbstractContextManager[None]:
        """Around the forward and backward pass of a micro-batch; processes add up their gradients in the last one."""
        return nullcontext() if last else self.accelerator.no_sync(self.wrapped)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of this process's loss; those of all processes are averaged."""
        self.accelerator.backward(loss)

    def step(self) -> float:
        """Clip and take an optimizer step, left out where the gradient is not finite; the norm before clipping."""
        trained = [parameter for parameter in self.wrapped.parameters() if parameter.requires_grad]
        norm = float(self.accelerator.clip_grad_norm_(trained, self.options.max_grad_norm))
        if norm < float("inf"):
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def write(self, folder: Path) -> None:
        """Put trained parameters and optimizer state into a folder, whole. Call in every process."""
        parameters = get_model_state_dict(self.models, options=_TRAINED)
        state = get_optimizer_state_dict(self.models, self.optimizer.optimizer, options=_TRAINED)
        if processes.is_first():
            torch.save({"parameters": parameters, "optimizer": state}, folder / STATE)

    def read(self, folder: Path) -> None:
        """Go on from what `write` put there. Call in every process."""
        # Mapped, so that the processes of one machine share the pages that they read.
        state = torch.load(folder / STATE, map_location="cpu", weights_only=True, mmap=True)
        set_model_state_dict(self.models, state["parameters"], options=_TRAINED)
        set_optimizer_state_dict(self.models, self.optimizer.optimizer, state["optimizer"], options=_TRAINED)

    def whole_state(self, prefix: str) -> dict[str, Tensor]:
        """The state of the submodule whose names start so, on the CPU of the first process. Call in every process."""
        state = get_model_state_dict(self.models, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        tensors = {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


class DeepSpeedUpdates(Updates):
    """The same under a DeepSpeed engine. Its checkpoints are read by as many processes as wrote them."""

    skips_allowed = 0  # the engine says what the norm was when the step is done

    def __init__(self, accelerator: Accelerator, models: Any, options: OptimizerBlock) -> None:
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        config["train_micro_batch_size_per_gpu"] = options.micro_batch_size
        config["gradient_accumulation_steps"] = 1  # which divides losses; ours are shares of the minibatch's already
        config["gradient_clipping"] = options.max_grad_norm
        super().__init__(accelerator, models, options)

    @contextmanager
    def accumulate(self, *, last: bool) -> Iterator[None]:
        """See `Updates`. ZeRO spreads gradients out in every pass, and adds up what it keeps of them."""
        self.wrapped.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        """See `Updates`."""
        self.wrapped.backward(loss)

    def step(self) -> float:
        """See `Updates`; no step is left out."""
        self.wrapped.step()
        return float(self.wrapped.get_global_grad_norm())

    def write(self, folder: Path) -> None:
        """Put what each process holds into a folder. Call in every process."""
        self.wrapped.save_checkpoint(str(folder), tag="shards", exclude_frozen_parameters=True)

    def read(self, folder: Path) -> None:
        """Go on from what `write` put there. Call in every process."""
        self.wrapped.load_checkpoint(str(folder), tag="shards", load_module_strict=False)

    def whole_state(self, prefix: str) -> dict[str, Tensor]:
        """See `Updates`; the trained parameters in float32, one parameter gathered at a time."""
        from deepspeed.runtime.zero import GatheredParameters
        from deepspeed.utils import safe_get_full_fp32_param

        buffers = dict(self.models.named_buffers())
        persistent = {name: tensor.cpu() for name, tensor in self.models.state_dict().items() if name in buffers}
        state = {name.removeprefix(prefix): tensor for name, tensor in persistent.items() if name.startswith(prefix)}
        for name, parameter in self.models.named_parameters(remove_duplicate=False):
            if name.startswith(prefix):
                with GatheredParameters([parameter]):
                    whole = safe_get_full_fp32_param(parameter) if parameter.requires_grad else parameter.data
                    state[name.removeprefix(prefix)] = whole.cpu().clone()
        return state


def adamw(models: torch.nn.Module, options: OptimizerBlock) -> torch.optim.AdamW:
    """AdamW over what is trained of the models."""
    trained = [parameter for parameter in models.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(
        trained, lr=options.learning_rate, eps=ADAM_EPS, weight_decay=options.weight_decay, betas=ADAM_BETAS
    )


def _keep_results_unrounded(plugin: Any) -> None:
    """FSDP2 would round log-probs and values, which are float32 whatever they are computed in, and summed gradients."""
    if plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = replace(
            plugin.mixed_precision_policy, output_dtype=None, reduce_dtype=torch.float32
        )


def open_updates(accelerator: Accelerator, models: Any, options: OptimizerBlock) -> Updates:
    """Updates of the kind that the accelerator was configured for."""
    kind = DeepSpeedUpdates if accelerator.distributed_type == DistributedType.DEEPSPEED else Updates
    return kind(accelerator, models, options)
