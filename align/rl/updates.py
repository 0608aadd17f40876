"""Turns gradients into optimizer steps, and saves parameters and optimizer state, under any kind of sharding.

`Updates` uses accelerate with PyTorch's own optimizer: one process, DDP or FSDP2. `DeepSpeedUpdates` has the same
interface and uses a DeepSpeed engine, which accumulates, clips and steps by itself.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
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

from align.errors import InputError
from align.models.sharding import DEEPSPEED_SUMS, deepspeed_state, set_precision
from align.models.wrappers import is_sharded
from align.run import processes
from align.settings.blocks import OptimizerBlock

ADAM_BETAS = (0.9, 0.999)
STATE = "state.pt"
_TRAINED = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True, strict=False)


class Updates:
    """The trained parameters of `models` and their AdamW optimizer, under accelerate.

    Use `wrapped` for passes with a gradient and `models` for the others: DDP would broadcast buffers in each pass, and
    processes may run different numbers of passes.
    """

    kind = "whole"
    """Only updates of the same kind can read a checkpoint that `write` wrote."""

    def __init__(self, accelerator: Accelerator, models: Any, options: OptimizerBlock) -> None:
        self.accelerator = accelerator
        self.options = options
        if accelerator.is_fsdp2:
            set_precision(accelerator.state.fsdp_plugin, models.compute_dtype)
        self.wrapped, self.optimizer = accelerator.prepare(models, adamw(models, options))
        self.models = accelerator.unwrap_model(self.wrapped)
        self.sharded = any(is_sharded(parameter) for parameter in self.models.parameters())

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next step."""
        return float(self.optimizer.param_groups[0]["lr"])

    @learning_rate.setter
    def learning_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def accumulate(self, *, last: bool) -> AbstractContextManager[None]:
        """Context for a micro-batch's forward and backward passes. Sharded gradients are reduced in the last one.

        Without sharding they are averaged in `step`: DDP expects a single pass per step, which uses every parameter.
        """
        return nullcontext() if last and self.sharded else self.accelerator.no_sync(self.wrapped)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of this process's loss, which is averaged over all processes."""
        self.accelerator.backward(loss)

    def step(self) -> dict[str, float]:
        """Clip the gradients and take a step, or skip it if one is not finite.

        What only the value loss trains is clipped by itself: a value far from its returns has a gradient so long that
        the policy's would be next to nothing beside it.

        Returns:
            norms before clipping: `gradient_norm` of all, and `value_gradient_norm` of what only the value loss trains.
        """
        groups = self.models.gradient_groups()  # by the name of the norm
        if not self.sharded and processes.world_size() > 1:
            average_gradients([parameter for group in groups.values() for parameter in group])
        norms = {
            name: float(self.accelerator.clip_grad_norm_(group, self.options.max_grad_norm))
            for name, group in groups.items()
        }
        if all(norm < float("inf") for norm in norms.values()):
            self.optimizer.step()
        self.optimizer.zero_grad()
        of_value = {name: norm for name, norm in norms.items() if name != "policy_gradient_norm"}
        return {"gradient_norm": math.hypot(*norms.values()), **of_value}

    def write(self, folder: Path) -> None:
        """Write the unsharded trained parameters and optimizer state into a folder. Call in every process."""
        parameters = get_model_state_dict(self.models, options=_TRAINED)
        state = get_optimizer_state_dict(self.models, self.optimizer.optimizer, options=_TRAINED)
        if processes.is_first():
            torch.save({"parameters": parameters, "optimizer": state}, folder / STATE)

    def read(self, folder: Path) -> None:
        """Restore what `write` saved. Call in every process."""
        # Memory-mapped, so that the processes of one machine share the pages.
        state = torch.load(folder / STATE, map_location="cpu", weights_only=True, mmap=True)
        set_model_state_dict(self.models, state["parameters"], options=_TRAINED)
        set_optimizer_state_dict(self.models, self.optimizer.optimizer, state["optimizer"], options=_TRAINED)

    def whole_state(self, prefix: str) -> dict[str, Tensor]:
        """The unsharded state under a name prefix, on the first process's CPU. Call in every process."""
        state = get_model_state_dict(self.models, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        tensors = {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


class DeepSpeedUpdates(Updates):
    """`Updates` under a DeepSpeed engine (ZeRO stage 3). Reading a checkpoint takes as many processes as writing it.

    Raises:
        InputError: another stage is configured.
    """

    def __init__(self, accelerator: Accelerator, models: Any, options: OptimizerBlock) -> None:
        plugin = accelerator.state.deepspeed_plugin
        if plugin.zero_stage != 3:
            raise InputError(
                f"ppo: DeepSpeed is configured for ZeRO stage {plugin.zero_stage}, and ppo supports stage 3 only; "
                "use recipes/accelerate/zero3.yaml, or recipes/accelerate/ddp.yaml if the models fit on each GPU"
            )
        plugin.deepspeed_config |= {
            "train_micro_batch_size_per_gpu": options.micro_batch_size,
            "gradient_accumulation_steps": 1,  # DeepSpeed divides losses by it, and ours already are parts of a mean
            "gradient_clipping": options.max_grad_norm,
            "bf16": {"enabled": models.compute_dtype == torch.bfloat16},
            "fp16": {"enabled": False},
            **DEEPSPEED_SUMS,
        }
        self.kind = f"DeepSpeed in {processes.world_size()} processes"
        super().__init__(accelerator, models, options)

    @contextmanager
    def accumulate(self, *, last: bool) -> Iterator[None]:
        """See `Updates`. ZeRO-3 reduces gradients in every pass and accumulates each process's shard."""
        self.wrapped.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        self.wrapped.backward(loss)

    def step(self) -> dict[str, float]:
        """See `Updates`. The engine clips all gradients together, and knows their common norm alone."""
        self.wrapped.step()
        # A minibatch's first pass overwrites only the gradients that it computes, and imitation computes none for the
        # value, whose gradients of this step would then count again.
        self.wrapped.optimizer.grad_partitions_flat_buffer.zero_()
        return {"gradient_norm": float(self.wrapped.get_global_grad_norm())}

    def write(self, folder: Path) -> None:
        """Write each process's shard into a folder. Call in every process."""
        self.wrapped.save_checkpoint(str(folder), tag="shards", exclude_frozen_parameters=True)

    def read(self, folder: Path) -> None:
        """Restore what `write` saved. Call in every process."""
        loaded, _ = self.wrapped.load_checkpoint(str(folder), tag="shards", load_module_strict=False)
        if loaded is None:
            raise InputError(f"{folder}: DeepSpeed finds no state in it; remove the folder to start ppo from scratch")

    def whole_state(self, prefix: str) -> dict[str, Tensor]:
        """See `Updates`; the trained parameters in float32."""
        return deepspeed_state(self.models, prefix)


def average_gradients(parameters: Sequence[Tensor]) -> None:
    """Average gradients over all processes. A parameter that a process did not use has a zero gradient there."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    pending = [torch.distributed.all_reduce(gradient, async_op=True) for gradient in gradients]
    for gradient, reduction in zip(gradients, pending, strict=True):
        reduction.wait()
        gradient /= processes.world_size()


def adamw(models: Any, options: OptimizerBlock) -> torch.optim.AdamW:
    """AdamW over the models' trained parameters."""
    trained = [parameter for parameter in models.parameters() if parameter.requires_grad]
    epsilon = options.epsilon if options.epsilon is not None else models.adam_epsilon
    return torch.optim.AdamW(
        trained, lr=options.learning_rate, eps=epsilon, weight_decay=options.weight_decay, betas=ADAM_BETAS
    )


def is_sharding(accelerator: Accelerator) -> bool:
    """Whether each process holds only a shard of the weights."""
    return accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def open_accelerator() -> Accelerator:
    """The run's accelerator. Models loaded afterwards are unsharded until `open_updates` shards them."""
    # The models handle the recipe's precision themselves, whatever accelerate's configuration says.
    accelerator = Accelerator(mixed_precision="no")
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        from transformers.integrations import unset_hf_deepspeed_config

        # Otherwise transformers loads models in shards that only a DeepSpeed engine can run; reward models have none.
        unset_hf_deepspeed_config()
    return accelerator


def open_updates(accelerator: Accelerator, models: Any, options: OptimizerBlock) -> Updates:
    """Updates of the kind that the accelerator was configured for."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return DeepSpeedUpdates(accelerator, models, options)
    return Updates(accelerator, models, options)
