"""PPO learns: a tiny random model reaches a stated reward from several seeds, and fails if the sign is flipped."""

import json

import pytest
import torch

from align.constitution.constitution import Constitution
from align.constitution.principles import Principle
from align.errors import AlignError
from align.feedback.direct import DirectScorer
from align.feedback.judge import Judge
from align.rl.batches import micro_batches
from align.rl.experience import Collector
from align.rl.reward_sources import JudgeReward
from align.rl.rollout import Completion
from align.settings.blocks import JudgeBlock, LoraBlock, OptimizerBlock
from tests.rl.tiny_ppo import build_trainer, settings
from tests.tiny import build_tiny_model

REACHED = 0.8


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ppo_reaches_the_stated_reward(tiny_model_dir, tmp_path, seed):
    figures = build_trainer(tiny_model_dir, tmp_path / "run", settings(), seed=seed).train()
    assert figures["score"] > REACHED


def test_with_the_advantages_sign_flipped_it_fails(tiny_model_dir, tmp_path, monkeypatch):
    estimate = Collector._advantages

    def flipped(self, *arguments):
        advantages, returns = estimate(self, *arguments)
        return -advantages, returns

    monkeypatch.setattr(Collector, "_advantages", flipped)
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


def test_a_judge_that_scores_directly_teaches_its_rules(tiny_model_dir, tmp_path):
    """Direct RLAIF: completions come to follow more of the rules."""
    rules = {"lower": "[A-Z0-9]", "plain": r"[^\x00-\x7f]"}
    principles = tuple(
        Principle.model_validate({"id": name, "text": name, "rule": {"excludes_regex": pattern}})
        for name, pattern in rules.items()
    )
    judge = Judge(Constitution(id="rules", title="rules", principles=principles), JudgeBlock(kind="rule"))
    block = settings(iterations=16)
    build_trainer(tiny_model_dir, tmp_path / "run", block, reward=JudgeReward(DirectScorer(judge))).train()
    scores = [json.loads(line)["score"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert scores[0] < 0.3
    assert sum(scores[-3:]) / 3 > 0.6


def test_demonstrations_mixed_in_become_likelier(tiny_model_dir, tmp_path):
    def imitated(coefficient):
        block = settings(iterations=4, ptx_coef=coefficient, kl_coef=0.0)
        trainer = build_trainer(tiny_model_dir, tmp_path / f"run{coefficient}", block)
        prompt = trainer.prompts[0]
        words = tuple(trainer.tokenizer("Zebra 123", add_special_tokens=False)["input_ids"])
        trainer.learner.demonstrations = [Completion(prompt, words, "Zebra 123", True, ())]
        trainer.train()
        pad_id = trainer.tokenizer.pad_token_id
        batch = micro_batches(trainer.learner.demonstrations, [0], 1, pad_id, trainer.device, share=False)[0]
        with torch.no_grad():
            return float(trainer.models("imitate", sequences=batch.sequences).result.mean())

    assert imitated(1.0) > imitated(0.0) + 1.0


@pytest.mark.parametrize("value", ["adapter", "head"])
def test_log_probs_kept_from_sampling_train_as_recomputed_ones_do(tiny_model_dir, tmp_path, monkeypatch, value):
    def trained(kept: bool) -> list[dict[str, float]]:
        block = settings(iterations=3, value=value, optimizer=OptimizerBlock(batch_size=16, micro_batch_size=8))
        trainer = build_trainer(tiny_model_dir, tmp_path / f"{kept}", block, lora=LoraBlock(r=4))
        assert trainer.models.reuses_sampled_logprobs
        if not kept:
            monkeypatch.setattr(type(trainer.models), "reuses_sampled_logprobs", False)
        trainer.train()
        return [json.loads(line) for line in (tmp_path / f"{kept}/metrics.jsonl").read_text().splitlines()]

    for kept, recomputed in zip(trained(True), trained(False), strict=True):
        assert 0 < kept["first_log_ratio"] < 1e-4
        for name, figure in recomputed.items():
            assert kept[name] == pytest.approx(figure, rel=1e-3, abs=1e-4), name


def test_the_first_minibatch_meets_its_own_log_probs(tiny_model_dir, tmp_path):
    """With one minibatch and one epoch every ratio is 1, however sampling rounded."""
    trainer = build_trainer(tiny_model_dir, tmp_path, settings(iterations=1, epochs=1), lora=LoraBlock(r=4))
    figures = trainer.train()
    assert (figures["largest_log_ratio"], figures["ratio"], figures["kl_to_old_k3"]) == (0, 1, 0)
    assert figures["first_log_ratio"] > 0


def test_training_that_is_not_what_sampled_stops_the_run(tiny_model_dir, tmp_path, monkeypatch):
    trainer = build_trainer(tiny_model_dir, tmp_path, settings(iterations=2), lora=LoraBlock(r=4))
    trainer.models.temperature = 0.9
    sample = type(trainer.collector)._sample

    def sample_warmer(collector, iteration):
        trainer.models.temperature = 1.1
        completions = sample(collector, iteration)
        trainer.models.temperature = 0.9
        return completions

    monkeypatch.setattr(type(trainer.collector), "_sample", sample_warmer)
    with pytest.raises(AlignError, match=r"iteration 1's first minibatch differ by 0\.\d+ from those of sampling"):
        trainer.train()
