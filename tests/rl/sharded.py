"""PPO on the tiny model with its weights sharded over CPU processes; run by test_sharded.py under torchrun.

accelerate turns FSDP2 and DeepSpeed on for GPUs only, so its state is told here what a GPU would have made it say.
Everything after that (wrapping, passes, clipping, checkpoints) is the libraries' own path, over gloo.
"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin

from align import processes
from align.config import LoraBlock, OptimizerBlock
from align.models.policy import save_model
from align.models.wrapped import is_sharded
from tests.rl.tiny_ppo import build_trainer, settings

BLOCK = settings(
    rollout_batch=8,
    epochs=2,
    checkpoint_every=1,
    optimizer=OptimizerBlock(learning_rate=3e-3, batch_size=8, micro_batch_size=2, schedule="constant"),
)
ADAPTERS = LoraBlock(r=4, alpha=8)


def fsdp2_accelerator(dtype: torch.dtype) -> Accelerator:
    """An accelerator that shards by FSDP2, and computes in `dtype`."""
    accelerator = Accelerator(cpu=True)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", reshard_after_forward=True
    )
    if dtype == torch.bfloat16:
        plugin.set_mixed_precision("bf16")
    AcceleratorState._shared_state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}
    return accelerator


def zero3_accelerator(dtype: torch.dtype) -> Accelerator:
    """An accelerator that shards by DeepSpeed's ZeRO stage 3, down to the smallest parameter."""
    from deepspeed import comm

    accelerator = Accelerator(cpu=True)
    accelerator.deepspeed_engine_wrapped = None
    comm.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    plugin = DeepSpeedPlugin(zero_stage=3)
    plugin.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    plugin.deepspeed_config["bf16"] = {"enabled": dtype == torch.bfloat16}
    plugin.select(_from_accelerator_state=True)
    PartialState._shared_state["distributed_type"] = DistributedType.DEEPSPEED
    AcceleratorState._shared_state |= {
        "distributed_type": DistributedType.DEEPSPEED,
        "deepspeed_plugins": {"default": plugin},
    }
    return accelerator


SHARDING = {"fsdp2": fsdp2_accelerator, "zero3": zero3_accelerator}


def main(model_dir: Path, output: Path, arrangement: str, sharding: str, iterations: int) -> None:
    """Train up to so many iterations, and save the policy in `output`."""
    processes.connect()
    dtype = torch.bfloat16 if arrangement.endswith("bf16") else torch.float32
    accelerator = SHARDING[sharding](dtype) if sharding in SHARDING else None
    lora = ADAPTERS if arrangement.startswith("lora") else None
    block = BLOCK.model_copy(update={"iterations": iterations})
    trainer = build_trainer(model_dir, output, block, lora=lora, dtype=dtype, accelerator=accelerator)
    assert all(is_sharded(parameter) == (sharding in SHARDING) for parameter in trainer.models.parameters())
    trainer.train()
    state = trainer.policy_state()
    if processes.is_first():
        save_model(trainer.models.policy, trainer.tokenizer, output, dtype, adapter_name="policy", state_dict=state)
    processes.barrier()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4], int(sys.argv[5]))
