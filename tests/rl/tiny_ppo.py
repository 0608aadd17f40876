"""PPO on a tiny random model and a programmatic reward, for the tests of the trainer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from align.data.chat import prompt_ids
from align.models.loading import load_tokenizer, stop_token_ids
from align.records import Message, Prompt
from align.rl.loading import RewardFolder, load_models
from align.rl.ppo import PpoTrainer
from align.rl.rewards import Response, Rewards, RewardSource
from align.rl.rollout import TokenizedPrompt
from align.rl.settings import PpoBlock, ScoreBlock
from align.run.tracking import Tracker
from align.settings.blocks import LoraBlock, OptimizerBlock, SamplingBlock, TrackingBlock


def share_of_letters(responses: Sequence[Response]) -> torch.Tensor:
    """The share of a completion's characters that are lower-case letters; a random tiny model starts at about 0.3."""
    texts = [response.answer for response in responses]
    return torch.tensor([sum("a" <= char <= "z" for char in text) / max(len(text), 1) for text in texts])


def settings(**changes: Any) -> PpoBlock:
    plain: dict[str, Any] = {
        "iterations": 12,
        "rollout_batch": 32,
        "epochs": 4,
        "optimizer": OptimizerBlock(learning_rate=3e-3, batch_size=32, micro_batch_size=16, schedule="constant"),
        "sampling": SamplingBlock(max_new_tokens=8, temperature=1.0, batch_size=32),
        "kl_coef": 0.002,
        "score": ScoreBlock(normalise="running", clip=None),
        "missing_eos_penalty": 0.0,
        "checkpoint_every": 1000,
    }
    return PpoBlock(**{**plain, **changes})


def build_trainer(
    model_dir: Path,
    output: Path,
    block: PpoBlock,
    *,
    seed: int = 0,
    reward: Any = share_of_letters,
    sources: Sequence[RewardSource] | None = None,
    lora: LoraBlock | None = None,
    dtype: torch.dtype = torch.float32,
    accelerator: Accelerator | None = None,
    reward_folder: RewardFolder | None = None,
) -> PpoTrainer:
    torch.manual_seed(seed)
    folder = reward_folder or RewardFolder(output / "none", on_policy_trunk=False, mean=0.0, std=1.0)
    value = "head" if lora is None and reward_folder is None else block.value
    options: dict[str, Any] = {"dtype": dtype, "temperature": block.sampling.temperature}
    options["value"] = value if block.advantage == "gae" else None
    models = load_models(model_dir, folder, lora, **options)
    tokenizer = load_tokenizer(str(model_dir))
    prompts = []
    for number in range(40):
        conversation = (Message("user", "the cat " * (number % 4) + f"sat {number}"),)
        row = Prompt(id=f"p{number}", prompt=conversation, split="rl")
        prompts.append(TokenizedPrompt(row, tuple(prompt_ids(tokenizer, conversation))))
    output.mkdir(parents=True, exist_ok=True)
    return PpoTrainer(
        models,
        tokenizer,
        prompts,
        Rewards(sources or [RewardSource("letters", reward)], block.score),
        block,
        stop_ids=stop_token_ids(models.causal_lm, tokenizer),
        seed=seed,
        output=output,
        tracker=Tracker(output, TrackingBlock(), "tiny", "ppo"),
        accelerator=accelerator or Accelerator(cpu=True),
    )
