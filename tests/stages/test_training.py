"""What the training stages share: a run that is interrupted and resumed equals an uninterrupted one."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from align.errors import NotFinite
from align.records import Message
from align.run.artefacts import output_digests
from align.run.stage import Stage
from tests.stages.training import SMALL_LORA, pair, revision, run, sample, upstream

OPTIMIZER = {"learning_rate": 5e-3, "batch_size": 4, "micro_batch_size": 2, "schedule": "cosine", "warmup_ratio": 0.2}
SETTINGS: dict[str, Any] = {"optimizer": OPTIMIZER, "epochs": 2, "trl": {"save_steps": 2}}


class Interrupted(Exception):
    pass


def stage_named(name: str) -> Stage:
    return import_module(f"align.stages.{name}").STAGE


def upstreams(folder: Path, model: Path) -> dict[str, Path]:
    (folder / "sft").mkdir(parents=True)
    (folder / "sft/model").symlink_to(model)
    return {
        "sample": upstream(folder, "sample", samples=[sample(n) for n in range(16)]),
        "revise": upstream(folder, "revise", revisions=[revision(n) for n in range(10)]),
        "sft": folder / "sft",
        "compare": upstream(folder, "compare", pairs=[pair(n, 0.9) for n in range(14)]),
    }


def outputs(stage: Stage, folder: Path) -> dict[str, str]:
    return output_digests(folder, [name for name in stage.outputs if (folder / name).exists()])


def interrupt_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    from align.training.callbacks import TrackingCallback

    def stop(self: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == steps:
            raise Interrupted

    monkeypatch.setattr(TrackingCallback, "on_step_begin", stop)


@pytest.mark.parametrize("lora", [None, SMALL_LORA], ids=["full", "lora"])
@pytest.mark.parametrize(("name", "steps"), [("sft", 3), ("sft", 5), ("reward", 4), ("dpo", 3)])
def test_resumed_run_equals_undisturbed_run(
    tmp_path: Path,
    tiny_model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    steps: int,
    lora: dict[str, Any] | None,
) -> None:
    stage, inputs = stage_named(name), upstreams(tmp_path / "in", tiny_model_dir)
    undisturbed = run(stage, SETTINGS, tiny_model_dir, tmp_path / "a", inputs, lora=lora)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt_after(patch, steps)
        run(stage, SETTINGS, tiny_model_dir, tmp_path / "b", inputs, lora=lora)
    assert not (tmp_path / "b/model").exists()
    resumed = run(stage, SETTINGS, tiny_model_dir, tmp_path / "b", inputs, lora=lora)
    assert outputs(stage, tmp_path / "b") == outputs(stage, tmp_path / "a")
    assert resumed == undisturbed


def test_rows_batched_by_length_come_in_the_same_order_after_a_kill_in_a_later_epoch(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, inputs = stage_named("dpo"), upstreams(tmp_path / "in", tiny_model_dir)
    pairs = [pair(n, 0.9, chosen="Yes! " * (n % 5 + 1)) for n in range(14)]
    upstream(tmp_path / "in", "compare", pairs=pairs)
    block = {**SETTINGS, "epochs": 3, "trl": {"save_steps": 1, "train_sampling_strategy": "group_by_length"}}
    run(stage, block, tiny_model_dir, tmp_path / "a", inputs, lora=SMALL_LORA)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt_after(patch, 6)
        run(stage, block, tiny_model_dir, tmp_path / "b", inputs, lora=SMALL_LORA)
    run(stage, block, tiny_model_dir, tmp_path / "b", inputs, lora=SMALL_LORA)
    assert outputs(stage, tmp_path / "b") == outputs(stage, tmp_path / "a")


def test_a_run_interrupted_after_its_last_step_only_saves(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, inputs = stage_named("reward"), upstreams(tmp_path / "in", tiny_model_dir)
    undisturbed = run(stage, SETTINGS, tiny_model_dir, tmp_path / "a", inputs, lora=SMALL_LORA)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):

        def stop(*_: Any, **__: Any) -> None:
            raise Interrupted

        patch.setattr("align.training.fit.save_model", stop)
        run(stage, SETTINGS, tiny_model_dir, tmp_path / "b", inputs, lora=SMALL_LORA)
    resumed = run(stage, SETTINGS, tiny_model_dir, tmp_path / "b", inputs, lora=SMALL_LORA)
    assert outputs(stage, tmp_path / "b") == outputs(stage, tmp_path / "a")
    assert resumed == undisturbed


DYING = """
import json, os, signal, sys
from pathlib import Path
from transformers import Trainer

model, folder, settings, lora = json.loads(sys.argv[1])
save = Trainer._save_rng_state

def save_or_die(self, output_dir):
    if self.state.global_step == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    save(self, output_dir)

Trainer._save_rng_state = save_or_die
from align.stages.sft import STAGE
from tests.stages.training import run
inputs = {name: Path(folder, "in", name) for name in ("sample", "revise")}
run(STAGE, settings, Path(model), Path(folder, "b"), inputs, lora=lora)
"""


def test_a_checkpoint_that_a_kill_cut_short_is_not_resumed_from(tmp_path: Path, tiny_model_dir: Path) -> None:
    stage, inputs = stage_named("sft"), upstreams(tmp_path / "in", tiny_model_dir)
    run(stage, SETTINGS, tiny_model_dir, tmp_path / "a", inputs, lora=SMALL_LORA)
    arguments = json.dumps([str(tiny_model_dir), str(tmp_path), SETTINGS, SMALL_LORA])
    killed = subprocess.run([sys.executable, "-c", DYING, arguments], env=os.environ, capture_output=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    cut = tmp_path / "b/checkpoint/checkpoint-4"
    assert (cut / "adapter_model.safetensors").exists() and not (cut / "trainer_state.json").exists()
    run(stage, SETTINGS, tiny_model_dir, tmp_path / "b", inputs, lora=SMALL_LORA)
    assert outputs(stage, tmp_path / "b") == outputs(stage, tmp_path / "a")


def poisoned_model(folder: Path) -> Path:
    """A tiny model whose embedding of '~' is NaN."""
    from align.models.loading import load_causal_lm, load_tokenizer
    from tests.tiny import build_tiny_model

    build_tiny_model(folder, tie_word_embeddings=False)
    model = load_causal_lm(str(folder), torch.float32)
    (token,) = load_tokenizer(str(folder))("~", add_special_tokens=False)["input_ids"]
    model.get_input_embeddings().weight.data[token] = float("nan")
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["sft", "reward", "dpo"])
def test_a_loss_that_is_not_finite_names_step_and_prompt_and_keeps_the_checkpoint(tmp_path: Path, name: str) -> None:
    model = poisoned_model(tmp_path / "poisoned")
    stage, inputs = stage_named(name), upstreams(tmp_path / "in", model)
    odd = (Message("user", "What is ~ here?"),)
    revisions = [revision(n) for n in range(10)]
    pairs = [pair(n, 0.9) for n in range(30)]
    upstream(tmp_path / "in", "revise", revisions=[dataclasses.replace(revisions[0], prompt=odd), *revisions[1:]])
    upstream(tmp_path / "in", "compare", pairs=[*pairs[:-1], dataclasses.replace(pairs[-1], prompt=odd)])
    block = {**SETTINGS, "trl": {"save_steps": 1}, **({"held_out": 0} if name == "reward" else {})}
    with pytest.raises(NotFinite) as error:
        run(stage, block, model, tmp_path / "out", inputs, lora=SMALL_LORA)
    found = re.fullmatch(
        rf"{name}: loss is nan at step (\d+), among the rows (.*)\. The run stopped; (.*)", str(error.value)
    )
    assert found is not None, str(error.value)
    assert "What is ~ here?" in found[2]
    step = int(found[1])
    assert step > 1, "the test is to see a checkpoint that is kept; another seed would"
    assert found[3].startswith(f"the checkpoint of step {step - 1} is kept")
    assert (tmp_path / f"out/checkpoint/checkpoint-{step - 1}/complete").exists()
    assert not (tmp_path / "out/model").exists()


def test_a_gradient_that_is_not_finite_stops_the_run_before_it_is_saved(tmp_path: Path, tiny_model_dir: Path) -> None:
    stage, inputs = stage_named("sft"), upstreams(tmp_path / "in", tiny_model_dir)
    block = {**SETTINGS, "optimizer": {**OPTIMIZER, "learning_rate": 1e30, "warmup_ratio": 0}, "trl": {"save_steps": 1}}
    with pytest.raises(NotFinite, match=r"sft: grad_norm is nan at step 2. .* the checkpoint of step 1 is kept"):
        run(stage, block, tiny_model_dir, tmp_path / "out", inputs)
    assert not (tmp_path / "out/checkpoint/checkpoint-2").exists()


@pytest.mark.parametrize("name", ["sft", "reward", "dpo"])
def test_rows_can_be_batched_by_length(tmp_path: Path, tiny_model_dir: Path, name: str) -> None:
    stage, inputs = stage_named(name), upstreams(tmp_path / "in", tiny_model_dir)
    block = {**SETTINGS, "epochs": 1, "trl": {"train_sampling_strategy": "group_by_length"}}
    outcome = run(stage, block, tiny_model_dir, tmp_path / "out", inputs, lora=SMALL_LORA)
    assert outcome.counts["steps"] > 0
    assert (tmp_path / "out/model").exists()
