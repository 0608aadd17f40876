"""PPO on the tiny models with their weights sharded over CPU processes; test_sharded.py runs it under torchrun.

accelerate enables FSDP2 and DeepSpeed on GPUs only, so its state is set here to what it would be on GPUs. Everything
after that (loading, wrapping, passes, clipping, checkpoints) is the libraries' own path, over gloo.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor

from align.models.loading import load_tokenizer
from align.models.saving import save_model
from align.models.wrappers import is_sharded
from align.rl import updates
from align.rl.loading import RewardFolder, classifier_scores, load_classifier
from align.rl.ppo import PpoTrainer
from align.rl.rewards import RewardModel
from align.rl.rollout import Completion
from align.rl.settings import EarlyStopBlock
from align.run import processes
from align.settings.blocks import LoraBlock, OptimizerBlock
from tests.rl.tiny_ppo import build_trainer, settings

BLOCK = settings(
    rollout_batch=8,
    epochs=2,
    value="adapter",
    ptx_coef=0.5,
    checkpoint_every=1,
    optimizer=OptimizerBlock(learning_rate=3e-3, batch_size=8, micro_batch_size=2, schedule="constant"),
)
STOPPING_KL = 0.5
"""Nats per completion; the arrangement 'full' exceeds it in its third iteration."""
ADAPTERS = LoraBlock(r=4, alpha=8)
BACKWARDS_AN_ITERATION = 12
"""In each of two processes: two epochs with two micro-batches each for policy, value and demonstrations."""


def fsdp2_accelerator(arrangement: str) -> Accelerator:
    """An accelerator that shards by FSDP2."""
    accelerator = Accelerator(cpu=True)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", reshard_after_forward=True
    )
    plugin.set_mixed_precision("bf16")  # as in recipes/accelerate/fsdp2.yaml, whatever the recipe says
    AcceleratorState._shared_state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}
    return accelerator


def zero3_accelerator(arrangement: str) -> Accelerator:
    """An accelerator that shards by DeepSpeed's ZeRO stage 3: with 'full', down to the smallest parameter."""
    from deepspeed import comm

    accelerator = Accelerator(cpu=True)
    accelerator.deepspeed_engine_wrapped = None
    comm.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    plugin = DeepSpeedPlugin(zero_stage=3)
    if arrangement.startswith("full"):
        plugin.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    plugin.deepspeed_config["bf16"] = {"enabled": True}  # as in recipes/accelerate/zero3.yaml, whatever the recipe says
    plugin.select(_from_accelerator_state=True)
    PartialState._shared_state["distributed_type"] = DistributedType.DEEPSPEED
    AcceleratorState._shared_state |= {
        "distributed_type": DistributedType.DEEPSPEED,
        "deepspeed_plugins": {"default": plugin},
    }
    return accelerator


SHARDING: dict[str, Callable[[str], Accelerator]] = {"fsdp2": fsdp2_accelerator, "zero3": zero3_accelerator}


def build(
    model_dir: Path, reward_dir: Path, output: Path, arrangement: str, sharding: str, iterations: int
) -> PpoTrainer:
    """A trainer with a separate reward model, a value model, and demonstrations."""
    rule = EarlyStopBlock(window=1, kl_above=STOPPING_KL) if arrangement.endswith("stopped") else None
    accelerator = None
    if sharding:
        updates.Accelerator = lambda **_: SHARDING[sharding](arrangement)  # type: ignore[misc, assignment]
        accelerator = updates.open_accelerator()
    dtype = torch.bfloat16 if "bf16" in arrangement else torch.float32
    tokenizer = load_tokenizer(str(reward_dir))
    reward = RewardModel(
        classifier_scores(load_classifier(reward_dir, dtype), dtype, tokenizer.pad_token_id),
        batch_size=4,
    )
    # DeepSpeed clips the gradients of policy and value together, unlike one process.
    limit = 1e6 if "unclipped" in arrangement else BLOCK.optimizer.max_grad_norm
    optimizer = BLOCK.optimizer.model_copy(update={"max_grad_norm": limit})
    trainer = build_trainer(
        model_dir,
        output,
        BLOCK.model_copy(update={"iterations": iterations, "early_stop": rule, "optimizer": optimizer}),
        lora=ADAPTERS if arrangement.startswith("lora") else None,
        dtype=dtype,
        reward=reward,
        reward_folder=RewardFolder(reward_dir.parent, on_policy_trunk=True, mean=0.0, std=1.0),
        accelerator=accelerator,
    )
    words = tuple(tokenizer("the cat sat").input_ids)
    trainer.learner.demonstrations = [
        Completion(prompt, words, "the cat sat", True, ()) for prompt in trainer.prompts[:8]
    ]
    assert all(is_sharded(parameter) == bool(sharding) for parameter in trainer.models.parameters())
    return trainer


def spoil_one_gradient(trainer: PpoTrainer) -> None:
    """Make the first gradient of the second iteration NaN."""
    calls = iter(range(10**6))
    backward = trainer.updates.backward

    def spoilt(loss: Tensor) -> None:
        backward(loss * float("nan") if next(calls) == BACKWARDS_AN_ITERATION else loss)

    trainer.updates.backward = spoilt  # type: ignore[method-assign]


def main(model_dir: Path, reward_dir: Path, output: Path, arrangement: str, sharding: str, iterations: int) -> None:
    """Train up to the given number of iterations, and save the policy in `output`."""
    processes.connect()
    trainer = build(model_dir, reward_dir, output, arrangement, sharding, iterations)
    if arrangement.endswith("spoilt"):
        spoil_one_gradient(trainer)
    trainer.train()
    state = trainer.policy_state()
    if processes.is_first():
        model, dtype = trainer.models.policy, trainer.models.compute_dtype
        save_model(model, trainer.tokenizer, output, dtype, adapter_name="policy", state_dict=state)
    processes.disconnect()


if __name__ == "__main__":
    torch.set_num_threads(1)
    folders = [Path(word) for word in sys.argv[1:4]]
    main(*folders, *sys.argv[4:6], int(sys.argv[6]))
