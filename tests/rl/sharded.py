"""PPO on the tiny model with its weights sharded by FSDP2 in CPU processes; run by test_sharded.py under torchrun.

accelerate turns FSDP2 on for GPUs only, so its state is told here what a GPU would have made it say. Everything after
that (wrapping, passes, clipping, checkpoints) is accelerate's and PyTorch's own path, over gloo.
"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from safetensors.torch import save_file

from align import processes
from align.config import LoraBlock, OptimizerBlock
from align.models.ppo_models import PpoModels
from tests.rl.tiny_ppo import build_trainer, settings

BLOCK = settings(
    rollout_batch=8,
    epochs=2,
    checkpoint_every=1,
    optimizer=OptimizerBlock(learning_rate=3e-3, batch_size=8, micro_batch_size=2, schedule="constant"),
)
ADAPTERS = LoraBlock(r=4, alpha=8)


def sharding_accelerator(dtype: torch.dtype) -> Accelerator:
    """An accelerator that shards by FSDP2 although its processes are CPU's, and computes in `dtype`."""
    accelerator = Accelerator(cpu=True)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", reshard_after_forward=True
    )
    if dtype == torch.bfloat16:
        plugin.set_mixed_precision("bf16")
    AcceleratorState._shared_state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}
    return accelerator


def is_sharded(models: PpoModels) -> bool:
    return all(hasattr(parameter, "full_tensor") for parameter in models.parameters())


def main(model_dir: Path, output: Path, arrangement: str, iterations: int) -> None:
    """Train up to so many iterations, and leave the whole policy in `output`/policy.safetensors."""
    processes.connect()
    dtype = torch.bfloat16 if arrangement.endswith("bf16") else torch.float32
    accelerator = sharding_accelerator(dtype) if processes.world_size() > 1 else None
    lora = ADAPTERS if arrangement.startswith("lora") else None
    block = BLOCK.model_copy(update={"iterations": iterations})
    trainer = build_trainer(model_dir, output, block, lora=lora, dtype=dtype, accelerator=accelerator)
    assert is_sharded(trainer.models) == (processes.world_size() > 1)
    trainer.train()
    state = trainer.policy_state()
    if processes.is_first():
        save_file({name: tensor.clone() for name, tensor in state.items()}, output / "policy.safetensors")
    processes.barrier()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
