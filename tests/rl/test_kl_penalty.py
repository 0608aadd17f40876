"""PPO without a reward leads a perturbed policy back to its reference, by every KL estimator that a recipe may name."""

from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import pytest
import torch

from align.rl.ppo import PpoTrainer
from align.rl.rewards import Response
from align.rl.settings import PpoBlock
from align.settings.blocks import LoraBlock, OptimizerBlock, SamplingBlock
from tests.rl.tiny_ppo import build_trainer, settings
from tests.tiny import build_tiny_model

ESTIMATORS = get_args(PpoBlock.model_fields["kl_estimator"].annotation)


def no_reward(responses: Sequence[Response]) -> torch.Tensor:
    return torch.zeros(len(responses))


def next_token(trainer: PpoTrainer, ids: torch.Tensor, adapter: str | None) -> torch.Tensor:
    """(B, V) log-probs of the next token under the policy, or under the reference."""
    with trainer.models._adapter(adapter):
        return trainer.models.causal_lm(input_ids=ids).logits[:, -1].log_softmax(-1)


@torch.no_grad()
def exact_kl(trainer: PpoTrainer) -> float:
    """KL(policy || reference) of completions of two tokens of one prompt, over every first token."""
    prompt = torch.tensor([trainer.prompts[0].ids])
    first, ref_first = (next_token(trainer, prompt, adapter)[0] for adapter in ("policy", None))
    vocabulary = torch.arange(len(first))
    ids = torch.cat([prompt.expand(len(first), -1), vocabulary[:, None]], dim=1)
    second, ref_second = (next_token(trainer, ids, adapter) for adapter in ("policy", None))
    later = (second.exp() * (second - ref_second)).sum(-1)
    later[list(trainer.collector.stop_ids)] = 0  # a completion that has ended has no second token
    return float((first.exp() * (first - ref_first + later)).sum())


@pytest.mark.parametrize(
    ("estimator", "advantage"), [*((each, "leave_one_out") for each in ESTIMATORS), ("k1", "group_relative")]
)
def test_without_a_reward_the_exact_kl_falls(tmp_path: Path, estimator: str, advantage: str) -> None:
    model_dir = build_tiny_model(tmp_path / "model", initializer_range=0.1)
    block = settings(
        advantage=advantage,
        completions_per_prompt=8,
        iterations=16,
        epochs=1,
        kl_coef=1.0,
        kl_estimator=estimator,
        sampling=SamplingBlock(max_new_tokens=2, batch_size=256),
        optimizer=OptimizerBlock(learning_rate=5e-3, batch_size=64, micro_batch_size=64, schedule="constant"),
    )
    trainer = build_trainer(model_dir, tmp_path / "run", block, reward=no_reward, lora=LoraBlock(r=4))
    torch.manual_seed(1)
    for name, parameter in trainer.models.named_parameters():
        if "lora_B.policy" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    before = exact_kl(trainer)
    figures = trainer.train()
    after = exact_kl(trainer)
    assert before > 0.5
    assert after < 0.6 * before
    assert ("kl_loss" in figures) == (estimator != "k1")


def test_in_bf16_all_minibatches_take_the_kl_of_samplings_log_probs(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Later minibatches' log-probs are computed anew for the ratio, by another rounding than that of sampling."""
    block = settings(optimizer=OptimizerBlock(batch_size=8, micro_batch_size=8))
    trainer = build_trainer(tiny_model_dir, tmp_path, block, lora=LoraBlock(r=4), dtype=torch.bfloat16)
    experience = trainer.collector.collect(0, kl_coef=0.1)
    assert not torch.equal(experience.sampled_logprobs, experience.old_logprobs)
    difference = (experience.sampled_logprobs - experience.ref_logprobs) * experience.mask
    assert torch.equal(experience.kl["k1"], difference.sum(dim=1))
