"""PPO learns: a tiny random model reaches a stated reward, from several seeds, and not when its sign is wrong."""

import pytest
import torch

from align.config import LoraBlock, OptimizerBlock
from align.rl.ppo import PpoTrainer
from align.rl.rollout import Completion, micro_batches
from tests.rl.tiny_ppo import build_trainer, settings
from tests.tiny import build_tiny_model

REACHED = 0.8


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ppo_reaches_the_stated_reward(tiny_model_dir, tmp_path, seed):
    figures = build_trainer(tiny_model_dir, tmp_path / "run", settings(), seed=seed).train()
    assert figures["score"] > REACHED


def test_with_the_advantages_sign_flipped_it_fails(tiny_model_dir, tmp_path, monkeypatch):
    estimate = PpoTrainer._advantages

    def flipped(self, *arguments):
        advantages, returns = estimate(self, *arguments)
        return -advantages, returns

    monkeypatch.setattr(PpoTrainer, "_advantages", flipped)
    figures = build_trainer(tiny_model_dir, tmp_path / "run", settings()).train()
    assert figures["score"] < 0.3


@pytest.mark.parametrize("value", ["adapter", "head"])
def test_ppo_learns_with_adapters_on_a_frozen_trunk(tmp_path, value):
    # Output embeddings stay frozen under adapters, so they must be large enough for the trunk to choose among tokens.
    model_dir = build_tiny_model(tmp_path / "model", initializer_range=0.2)
    block = settings(
        value=value, iterations=20, optimizer=OptimizerBlock(learning_rate=1e-2, batch_size=32, schedule="constant")
    )
    figures = build_trainer(model_dir, tmp_path / "run", block, lora=LoraBlock(r=16, alpha=32)).train()
    assert figures["score"] > 0.6


@pytest.mark.parametrize("advantage", ["leave_one_out", "group_relative"])
def test_methods_without_a_value_learn_on_the_same_loop(tiny_model_dir, tmp_path, advantage):
    block = settings(advantage=advantage, completions_per_prompt=4, rollout_batch=8, iterations=24)
    figures = build_trainer(tiny_model_dir, tmp_path / "run", block).train()
    assert figures["score"] > REACHED


def test_demonstrations_mixed_in_become_likelier(tiny_model_dir, tmp_path):
    def imitated(coefficient):
        block = settings(iterations=4, ptx_coef=coefficient, kl_coef=0.0)
        trainer = build_trainer(tiny_model_dir, tmp_path / f"run{coefficient}", block)
        prompt = trainer.prompts[0]
        words = tuple(trainer.tokenizer("Zebra 123", add_special_tokens=False)["input_ids"])
        trainer.demonstrations = [Completion(prompt, words, "Zebra 123", True, ())]
        trainer.train()
        batch = micro_batches(trainer.demonstrations, [0], 1, trainer.tokenizer.pad_token_id, trainer.device)[0]
        with torch.no_grad():
            return float(trainer.models("imitate", sequences=batch.sequences).result.mean())

    assert imitated(1.0) > imitated(0.0) + 1.0
