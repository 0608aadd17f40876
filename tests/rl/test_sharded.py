"""PPO with weights sharded over processes gives the same result as one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.sharding import SHARDINGS
from tests.tiny import build_tiny_reward

FIGURES = (
    "score",
    "kl_to_reference_k1",
    "policy_loss",
    "value_loss",
    "gradient_norm",
    "entropy",
    "explained_variance",
    "ptx_loss",
)


def train(folders: list[Path], output: Path, arrangement: str, sharding: str = "", iterations: int = 2) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"] if sharding else []
    words = [*map(str, folders), str(output), arrangement, sharding, str(iterations)]
    command = [sys.executable, *launcher, "-m", "tests.rl.sharded", *words]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]


def metrics(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def folders(tiny_model_dir: Path, tmp_path: Path) -> list[Path]:
    """The tiny policy, and a tiny reward model where a reward stage would have put it."""
    return [tiny_model_dir, build_tiny_reward(tmp_path / "reward/model")]


@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("arrangement", ["lora", "full"])
def test_a_sharded_and_interrupted_run_gives_what_one_uninterrupted_process_does(
    folders: list[Path], tmp_path: Path, arrangement: str, sharding: str
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    arrangement += "-unclipped" if sharding == "zero3" else ""
    train(folders, one, arrangement)
    train(folders, two, arrangement, sharding, iterations=1)
    train(folders, two, arrangement, sharding)
    assert [row["step"] for row in metrics(two)] == [1, 2]
    for alone, together in zip(metrics(one), metrics(two), strict=True):
        assert together["first_log_ratio"] < 1e-4
        assert together["sampling_gap"] < 1e-5, "the policy that samples is the one that is trained"
        for name in FIGURES:
            assert together[name] == pytest.approx(alone[name], rel=1e-3, abs=1e-5), name
    alone, together = (load_file(folder / "model/model.safetensors") for folder in (one, two))
    assert alone.keys() == together.keys()
    for name, tensor in alone.items():
        assert torch.allclose(together[name], tensor, atol=1e-5), name


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_a_sharded_run_stops_early_and_publishes_its_best_checkpoint(
    folders: list[Path], tmp_path: Path, sharding: str
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    train(folders, one, "full-unclipped", iterations=1)
    train(folders, two, "full-unclipped-stopped", sharding, iterations=6)
    assert [row["step"] for row in metrics(two)] == [1, 2, 3]
    [row] = (two / "alarms.jsonl").read_text().splitlines()
    assert json.loads(row)["sentence"] == (
        "the run ended after iteration 3 because the KL to the reference was 0.757 nats a completion over 1 "
        "iterations, above 0.5; the policy of iteration 1, the best checkpoint, is published"
    )
    alone, together = (load_file(folder / "model/model.safetensors") for folder in (one, two))
    for name, tensor in alone.items():
        assert torch.allclose(together[name], tensor, atol=1e-5), name


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_a_sharded_run_in_bf16_keeps_full_precision_and_skips_a_step_whose_gradient_is_not_finite(
    folders: list[Path], tmp_path: Path, sharding: str
) -> None:
    train(folders, tmp_path, "lora-bf16-spoilt", sharding)
    first, second = metrics(tmp_path)
    assert first["kl_to_reference_k3"] < 1e-4 < second["kl_to_reference_k3"]
    assert 0 < first["first_log_ratio"] < 0.1, "sampling rounds differently from training"
    assert any(value != torch.tensor(value).bfloat16().item() for value in (first["entropy"], first["value_loss"]))
    adapter = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}
    assert (first["skipped_steps"], second["skipped_steps"]) == (0.0, 0.5)
    assert all(tensor.isfinite().all() for tensor in adapter.values())
    assert any(tensor.ne(tensor.bfloat16()).any() for tensor in adapter.values()), "bf16 copies of the parameters"
