"""PPO learns: a tiny random model reaches a stated reward, from several seeds, and not when its sign is wrong."""

import pytest

from align.config import LoraBlock, OptimizerBlock
from align.rl.ppo import PpoTrainer
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
