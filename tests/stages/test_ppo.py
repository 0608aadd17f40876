"""The ppo stage and its trainer on a tiny model: scores, prompts left out, and what stops a run."""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from align.engines.provenance import read_provenance
from align.errors import InputError, NotFinite
from align.figures.sentences import count_words, fold
from align.records import Message, Prompt, write_rows
from align.rl.rewards import Response
from align.rl.rollout import Completion, sample_completions
from align.rl.settings import PpoBlock
from align.run.artefacts import file_digest
from align.run.reproducibility import derive_seed
from align.run.stage import Context
from align.settings.blocks import JudgeBlock, ModelBlock, OptimizerBlock, TrackingBlock
from align.stages.ppo import STAGE as PPO
from align.stages.ppo import _reward_folder
from tests.rl.tiny_ppo import build_trainer, settings, share_of_letters
from tests.stages.training import SMALL_LORA, run, same
from tests.tiny import build_tiny_reward

SETTINGS = {
    "iterations": 2,
    "rollout_batch": 6,
    "epochs": 2,
    "optimizer": {"learning_rate": 1e-3, "batch_size": 6, "micro_batch_size": 3},
    "sampling": {"max_new_tokens": 6, "batch_size": 6},
    "score": {"normalise": "none", "clip": None},
}
LONG = 60
"""The number of words of the only prompt that is too long."""


@pytest.fixture
def inputs(tmp_path: Path, tiny_model_dir: Path) -> dict[str, Path]:
    """The folders of sample, sft and a reward stage that started from another model."""
    prompts = [Prompt(f"p{number}", (Message("user", f"Where is cat {number}?"),), "rl") for number in range(5)]
    prompts.append(Prompt("long", (Message("user", "cat " * LONG),), "rl"))
    prompts.append(Prompt("other", (Message("user", "Not for training."),), "eval"))
    folders = {name: tmp_path / "run" / name for name in ("sample", "sft", "reward")}
    for folder in folders.values():
        folder.mkdir(parents=True)
    write_rows(folders["sample"] / "prompts.jsonl", prompts)
    (folders["sft"] / "model").symlink_to(tiny_model_dir)
    build_tiny_reward(folders["reward"] / "model")
    figures = {"base": "model", "score_mean": 0.0, "score_std": 1.0}
    (folders["reward"] / "manifest.json").write_text(json.dumps({"figures": figures}))
    return folders


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("lora", [SMALL_LORA, None], ids=["adapters", "every weight"])
def test_scores_are_those_of_the_reward_model_opened_by_itself_on_the_policys_tokens(
    inputs: dict[str, Path], tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, lora: Any
) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    sampled: list[Completion] = []

    def draw(*args: Any, **options: Any) -> list[Completion]:
        drawn = sample_completions(*args, **options)
        sampled.extend(drawn)
        return drawn

    monkeypatch.setattr("align.rl.experience.sample_completions", draw)
    run(PPO, SETTINGS, tiny_model_dir, tmp_path / "out", inputs, lora=lora)

    folder = inputs["reward"] / "model"
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    written = rows(tmp_path / "out/rollouts.jsonl")
    assert len(written) == len(sampled) == 12
    assert any(row["finish_reason"] == "length" for row in written), "a cut completion gets no end of turn"
    for row, completion in zip(written, sampled, strict=True):
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        assert tokenizer.decode(completion.tokens, skip_special_tokens=True) == row["completion"]
        with torch.no_grad():
            states = model.model(torch.tensor([[*prompt, *completion.tokens]])).last_hidden_state
            score = model.score(states[0, -1])
        assert row["score"] == pytest.approx(float(score), rel=1e-4, abs=1e-5)


def test_a_rollout_names_the_weights_that_training_began_from_and_its_seed(
    inputs: dict[str, Path], tmp_path: Path, tiny_model_dir: Path
) -> None:
    run(PPO, SETTINGS, tiny_model_dir, tmp_path / "out", inputs, lora=SMALL_LORA)
    written = rows(tmp_path / "out/rollouts.jsonl")
    places = [(number, place) for number in range(2) for place in range(6)]
    assert [row["seed"] for row in written] == [derive_seed(7, "ppo", *place, 0) for place in places]
    (entry,) = read_provenance(tmp_path / "out").values()
    assert {row["provenance"] for row in written} == {entry.id}
    assert (entry.stage, entry.step, entry.engine, entry.model) == ("ppo", "completion", "local", "sft/model")
    assert entry.model_digest == file_digest(tiny_model_dir / "model.safetensors")
    assert (entry.settings["weights"], entry.settings["max_new_tokens"]) == ("as training began", 6)


def test_prompts_too_long_are_left_out_and_counted(
    inputs: dict[str, Path], tmp_path: Path, tiny_model_dir: Path
) -> None:
    outcome = run(
        PPO, {**SETTINGS, "max_prompt_tokens": LONG}, tiny_model_dir, tmp_path / "out", inputs, lora=SMALL_LORA
    )
    assert outcome.counts == {"prompts": 5, "prompts_too_long": 1}
    used = {row["prompt_id"] for row in rows(tmp_path / "out/rollouts.jsonl")}
    assert used == {f"p{number}" for number in range(5)}


def test_without_a_prompt_that_fits_it_says_which_setting_to_raise(
    inputs: dict[str, Path], tmp_path: Path, tiny_model_dir: Path
) -> None:
    with pytest.raises(InputError, match=r"6 in the rl split, 6 longer than ppo\.max_prompt_tokens"):
        run(PPO, {**SETTINGS, "max_prompt_tokens": 3}, tiny_model_dir, tmp_path / "out", inputs)


def test_a_batch_that_the_processes_cannot_share_is_refused(
    inputs: dict[str, Path], tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("align.run.processes.world_size", lambda: 4)
    with pytest.raises(InputError, match=r"ppo\.rollout_batch: 6 rows cannot be divided among 4 processes"):
        run(PPO, SETTINGS, tiny_model_dir, tmp_path / "out", inputs)


def test_siblings_take_the_place_of_a_value(inputs: dict[str, Path], tmp_path: Path, tiny_model_dir: Path) -> None:
    block = {**SETTINGS, "advantage": "leave_one_out", "rollout_batch": 3, "completions_per_prompt": 2}
    run(PPO, block, tiny_model_dir, tmp_path / "out", inputs, lora=SMALL_LORA)
    written = rows(tmp_path / "out/rollouts.jsonl")
    asked = [row["prompt_id"] for row in written]
    assert asked[::2] == asked[1::2]
    assert all(one["completion"] != two["completion"] for one, two in zip(written[::2], written[1::2], strict=True))
    assert all("value_loss" not in row for row in rows(tmp_path / "out/metrics.jsonl"))


def test_rewards_come_from_what_the_recipe_names(
    inputs: dict[str, Path], tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A function and a local classifier are the rewards; a gold source is only scored."""
    (tmp_path / "lengths.py").write_text(
        "def short(prompts, completions):\n    return [-len(completion) for completion in completions]\n"
        "def long(prompts, completions):\n    return [len(completion) for completion in completions]\n"
    )
    monkeypatch.chdir(tmp_path)
    rewards = [
        {"function": "lengths:long", "gold": True},
        {"function": "lengths:short", "weight": 3},
        {"model": str(inputs["reward"] / "model"), "name": "tiny"},
    ]
    block = {**SETTINGS, "rewards": rewards}
    del inputs["reward"]
    assert PPO.inputs(PPO.settings(**block)) == ("sample", "sft")
    assert PPO.files(PPO.settings(**block)) == ("lengths.py",)
    run(PPO, block, tiny_model_dir, tmp_path / "out", inputs, lora=SMALL_LORA)
    for row in rows(tmp_path / "out/rollouts.jsonl"):
        scores = row["scores"]
        assert scores["short"] == -scores["long"] == -len(row["completion"])
        assert row["score"] == pytest.approx((3 * scores["short"] + scores["tiny"]) / 4, rel=1e-5)
    metrics = rows(tmp_path / "out/metrics.jsonl")[-1]
    assert metrics["score/long"] == -metrics["score/short"]
    assert metrics["score_disagreement"] > 0


def test_the_manifest_says_how_the_run_ended_and_whose_policy_is_published(
    inputs: dict[str, Path], tmp_path: Path, tiny_model_dir: Path
) -> None:
    out = tmp_path / "out"
    rule = {"early_stop": {"window": 1}, "checkpoint_every": 1, "iterations": 3}
    outcome = run(PPO, {**SETTINGS, **rule}, tiny_model_dir, out, inputs, lora=SMALL_LORA)
    metrics = rows(out / "metrics.jsonl")
    seen_by = {iteration: metrics[min(iteration, 2)]["score"] for iteration in (1, 2, 3)}
    best = max(seen_by, key=lambda iteration: seen_by[iteration])
    ending = {name: outcome.figures[name] for name in ("iterations", "stopped_early", "published_iteration")}
    assert ending == {"iterations": 3, "stopped_early": None, "published_iteration": best}
    assert outcome.figures["score"] == metrics[best - 1]["score"]
    assert len(rows(out / "alarms.jsonl")) == (best < 3)
    assert "alarms.jsonl" in PPO.outputs


class Spoiled:
    """A reward that is NaN for one of the prompts from the second iteration on."""

    def __init__(self, value: float) -> None:
        self.value = value
        self.calls = 0
        self.spoiled = ""

    def __call__(self, responses: Sequence[Response]) -> torch.Tensor:
        self.calls += 1
        scores = share_of_letters(responses)
        if self.calls == 2:
            scores[5] = self.value
            self.spoiled = responses[5].prompt[-1].content.rpartition(" ")[2]
        return scores


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_reward_that_is_not_finite_stops_the_run_and_the_checkpoint_resumes(
    tmp_path: Path, tiny_model_dir: Path, value: float
) -> None:
    block = settings(iterations=3, checkpoint_every=1, rollout_batch=8, optimizer=OptimizerBlock(batch_size=8))
    reward = Spoiled(value)
    with pytest.raises(NotFinite) as stop:
        build_trainer(tiny_model_dir, tmp_path / "run", block, reward=reward).train()
    assert re.search(
        rf"reward of source 'letters' is not finite [^.]* at \w+ 2, prompt 'p{reward.spoiled}' \('(the cat )*sat ",
        str(stop.value),
    )
    assert stop.value.exit_code == 1
    assert [path.name for path in (tmp_path / "run/checkpoint").iterdir()] == ["iteration-000001"]
    assert [row["step"] for row in rows(tmp_path / "run/metrics.jsonl")] == [1]

    mended = build_trainer(tiny_model_dir, tmp_path / "run", block)
    undisturbed = build_trainer(tiny_model_dir, tmp_path / "undisturbed", block)
    mended.train()
    undisturbed.train()
    assert same(mended.policy_state(), undisturbed.policy_state())
    assert (tmp_path / "run/rollouts.jsonl").read_bytes() == (tmp_path / "undisturbed/rollouts.jsonl").read_bytes()
    assert [row["step"] for row in rows(tmp_path / "run/metrics.jsonl")] == [1, 2, 3]


def test_a_loss_that_is_not_finite_stops_the_run_before_the_weights_take_it(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    block = settings(iterations=2, rollout_batch=8, optimizer=OptimizerBlock(batch_size=8))
    trainer = build_trainer(tiny_model_dir, tmp_path / "run", block)
    before = {name: tensor.clone() for name, tensor in trainer.policy_state().items()}
    with torch.no_grad():
        trainer.models.value_head.bias.fill_(math.nan)
    with pytest.raises(NotFinite, match=r"loss is .*NaN.* at \w+ 1, prompt 'p\d+'"):
        trainer.train()
    assert same(before, trainer.policy_state())


@pytest.mark.parametrize(
    ("normalise", "moments"), [("held_out", (14.9, 7.1)), ("running", (14.9, 7.1)), ("none", (0.0, 1.0))]
)
def test_the_value_starts_in_the_unit_of_the_scores_it_predicts(
    tmp_path: Path, normalise: str, moments: tuple[float, float]
) -> None:
    figures = {"base": "sft", "score_mean": 14.9, "score_std": 7.1}
    (tmp_path / "manifest.json").write_text(json.dumps({"figures": figures}))
    block = PpoBlock.model_validate({"score": {"normalise": normalise}})
    folder = _reward_folder(SimpleNamespace(inputs={"reward": tmp_path}, settings=block))
    assert (folder.mean, folder.std) == moments


def test_an_adapter_on_the_output_layer_is_refused_when_the_recipe_is_read() -> None:
    def said(targets: object) -> list[str]:
        return PPO.check(PpoBlock(), {"model": ModelBlock.model_validate({"path": "m", "lora": targets})})

    assert said(None) == said({}) == said({"target_modules": ["q_proj"]}) == []
    [fault] = said({"target_modules": ["q_proj", "lm_head"]})
    assert fault.startswith("model.lora.target_modules: ppo does not train an adapter on the output layer (lm_head)")


RULES = """\
title: Letters
principles:
  - {id: no-e, text: Use no e., rule: {excludes: e}, weight: 2}
  - {id: short, text: Be short., rule: {max_words: 1}}
  - {id: calm, text: Be calm., rule: {excludes: "!"}, applies: [calls]}
"""


def test_the_judge_s_own_scores_are_the_reward(inputs: dict[str, Path], tmp_path: Path, tiny_model_dir: Path) -> None:
    """Direct RLAIF by rules: every score in the rollouts is the weighted share of rules that the text keeps."""
    (tmp_path / "letters.yaml").write_text(RULES)
    block = PpoBlock.model_validate({**SETTINGS, "rewards": [{"judge": "direct"}]})
    assert PPO.inputs(block) == ("sample", "sft")
    assert PPO.shared_blocks(block) == ("model", "constitution", "judge")
    assert PPO.shared_blocks(PpoBlock()) == ("model",)
    shared = {
        "model": ModelBlock.model_validate({"path": str(tiny_model_dir), "precision": "fp32", "lora": SMALL_LORA}),
        "constitution": str(tmp_path / "letters.yaml"),
        "judge": JudgeBlock(kind="rule"),
    }
    assert PPO.check(block, shared) == []
    assert PPO.check(block, {**shared, "judge": JudgeBlock(kind="contrast")})[0].startswith("judge.kind: 'contrast'")
    (tmp_path / "out").mkdir()
    PPO.run(Context("ppo", block, shared, inputs, tmp_path / "out", 0, "test", TrackingBlock()))

    written = rows(tmp_path / "out/rollouts.jsonl")
    assert len(written) == 12
    for row in written:
        kept = 2 * ("e" not in fold(row["completion"])) + (count_words(row["completion"]) <= 1)
        assert row["score"] == pytest.approx(kept / 3)
    assert len({row["score"] for row in written}) > 1
