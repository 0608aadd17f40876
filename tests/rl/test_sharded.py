"""PPO with its weights sharded over processes makes what one process makes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

FIGURES = ("score", "kl_to_reference_k1", "policy_loss", "value_loss", "gradient_norm", "entropy", "explained_variance")


def train(model_dir: Path, output: Path, arrangement: str, count: int, iterations: int = 2) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)] if count > 1 else []
    words = [str(model_dir), str(output), arrangement, str(iterations)]
    command = [sys.executable, *launcher, "-m", "tests.rl.sharded", *words]
    done = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]


def metrics(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("arrangement", ["lora", "full"])
def test_fsdp2_interrupted_trains_as_one_process_undisturbed_does(
    tiny_model_dir: Path, tmp_path: Path, arrangement: str
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    train(tiny_model_dir, one, arrangement, count=1)
    train(tiny_model_dir, two, arrangement, count=2, iterations=1)
    train(tiny_model_dir, two, arrangement, count=2)
    assert [row["step"] for row in metrics(two)] == [1, 2]
    for alone, together in zip(metrics(one), metrics(two), strict=True):
        assert together["first_log_ratio"] == 0
        for name in FIGURES:
            assert together[name] == pytest.approx(alone[name], rel=1e-3, abs=1e-5), name
    alone, together = (load_file(folder / "policy.safetensors") for folder in (one, two))
    assert alone.keys() == together.keys()
    for name, tensor in alone.items():
        assert torch.allclose(together[name], tensor, atol=1e-5), name


def test_fsdp2_in_bf16_gives_figures_in_full_precision(tiny_model_dir: Path, tmp_path: Path) -> None:
    train(tiny_model_dir, tmp_path, "lora-bf16", count=2)
    first, second = metrics(tmp_path)
    assert first["kl_to_reference_k3"] < 1e-4 < second["kl_to_reference_k3"]
    assert first["first_log_ratio"] < 0.05
    trained = load_file(tmp_path / "policy.safetensors")
    assert all(tensor.dtype == torch.float32 for name, tensor in trained.items() if ".lora_" in name)
