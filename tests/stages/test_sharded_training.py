"""The training stages, sharded by the shipped accelerate configurations, give the results of one process."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from align.pipeline.launch import _accelerate
from align.records import read_jsonl
from tests.sharding import SHARDINGS, small_config
from tests.stages.test_training import stage_named, upstreams
from tests.stages.training import SMALL_LORA, run, weights

OPTIMIZER = {"learning_rate": 1e-3, "batch_size": 4, "micro_batch_size": 1}
BLOCK: dict[str, Any] = {"optimizer": OPTIMIZER, "trl": {"save_steps": 2}}
STAGES: dict[str, dict[str, Any]] = {"sft": BLOCK, "reward": {**BLOCK, "epochs": 2, "held_out": 0.2}, "dpo": BLOCK}
ARRANGEMENTS: dict[str, dict[str, Any]] = {"full": {}, "lora": {"lora": SMALL_LORA}}
STEPS = 2
"""The step after which sharded runs are interrupted: at a checkpoint, and before every stage's last step."""


def steps_of(folder: Path) -> list[dict[str, Any]]:
    return list(read_jsonl(folder / "metrics.jsonl"))


def assert_same_figures(alone: Path, together: Path) -> None:
    """Every step is logged once, interrupted or not, with the figures of one process."""
    for one, two in zip(steps_of(alone), steps_of(together), strict=True):
        assert one.keys() == two.keys()
        for name, value in one.items():
            if isinstance(value, float):
                assert two[name] == pytest.approx(value, rel=2e-3, abs=1e-5), (together, one["step"], name)


def assert_same_model(alone: Path, together: Path, before: Path, kind: type[Any]) -> None:
    """Plain `from_pretrained` loads the model; its weights have changed, to those of one process."""
    opened = kind.from_pretrained(together, output_loading_info=True)
    assert not opened[1]["missing_keys"] and not opened[1]["unexpected_keys"]
    state, start = opened[0].state_dict(), weights(before)
    trained = weights(alone)
    assert trained.keys() == weights(together).keys()
    for name, tensor in trained.items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-3, atol=2e-5, msg=f"{together}: {name}")
    assert max(float((trained[name] - start[name]).abs().max()) for name in trained if name in start) > 5e-4


def assert_same_adapter(alone: Path, together: Path) -> None:
    from safetensors.torch import load_file

    one, two = (load_file(folder / "adapter_model.safetensors") for folder in (alone, together))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert two[name].dtype == torch.float32
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=2e-5, msg=f"{together}: {name}")


def has_more_digits_than_bf16(value: float) -> bool:
    return torch.tensor(value).bfloat16().item() != value


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_sharded_and_interrupted_stages_make_what_one_process_makes(
    tmp_path: Path, tiny_model_dir: Path, sharding: str
) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    inputs = upstreams(tmp_path / "in", tiny_model_dir)
    jobs = [(name, kind) for kind in ARRANGEMENTS for name in STAGES]
    in_two = [(name, STAGES[name], str(tmp_path / "two" / kind / name), ARRANGEMENTS[kind]) for name, kind in jobs]
    rounding = ("reward", STAGES["reward"], str(tmp_path / "bf16"), {**ARRANGEMENTS["lora"], "precision": "bf16"})
    arguments = json.dumps([str(tiny_model_dir), str(tmp_path / "in"), [*in_two, rounding], STEPS])
    config = small_config(sharding, tmp_path)
    command = [_accelerate(), "launch", "--config_file", str(config), "-m", "tests.stages.train_in_processes"]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run([*command, arguments], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-5000:]

    for name, arrangement in jobs:
        alone, together = (tmp_path / processes / arrangement / name for processes in ("one", "two"))
        run(stage_named(name), STAGES[name], tiny_model_dir, alone, inputs, **ARRANGEMENTS[arrangement])
        assert_same_figures(alone, together)
        kind = AutoModelForSequenceClassification if name == "reward" else AutoModelForCausalLM
        assert_same_model(alone / "model", together / "model", tiny_model_dir, kind)
        if arrangement == "lora":
            assert_same_adapter(alone / "adapter", together / "adapter")
    scores = [row["chosen_score"] for row in read_jsonl(tmp_path / "bf16/held_out.jsonl")]
    assert any(has_more_digits_than_bf16(score) for score in scores), "scores are rounded to bf16"
