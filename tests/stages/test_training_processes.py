"""The training stages in two processes train as in one, though the rows cannot be divided evenly."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from align.records import read_jsonl
from tests.stages.test_training import stage_named, upstreams
from tests.stages.training import SMALL_LORA, pair, revision, run, upstream, weights

LAUNCHER = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
OPTIMIZER = {"learning_rate": 1e-3, "batch_size": 8, "micro_batch_size": 2}
STAGES: dict[str, dict[str, Any]] = {
    "sft": {"optimizer": OPTIMIZER, "epochs": 2, "trl": {"train_sampling_strategy": "group_by_length"}},
    "reward": {"optimizer": OPTIMIZER, "epochs": 2, "held_out": 0},
    "dpo": {"optimizer": OPTIMIZER, "epochs": 2},
}


def test_two_processes_train_as_one(tmp_path: Path, tiny_model_dir: Path) -> None:
    """9 rows in batches of 8 leave one row for two processes, so one of them has only a filler in its last batch."""
    inputs = upstreams(tmp_path / "in", tiny_model_dir)
    upstream(tmp_path / "in", "revise", revisions=[revision(n, completion="Yes! " * (n + 1)) for n in range(9)])
    upstream(tmp_path / "in", "compare", pairs=[pair(n, 0.9, chosen="Yes! " * (n + 1)) for n in range(9)])
    jobs = [(name, block, str(tmp_path / "two" / name), {"lora": SMALL_LORA}) for name, block in STAGES.items()]
    arguments = json.dumps([str(tiny_model_dir), str(tmp_path / "in"), jobs, None])
    command = [sys.executable, *LAUNCHER, "-m", "tests.stages.train_in_processes", arguments]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]

    for name, settings in STAGES.items():
        run(stage_named(name), settings, tiny_model_dir, tmp_path / "one" / name, inputs, lora=SMALL_LORA)
        one, two = (tmp_path / processes / name for processes in ("one", "two"))
        steps = ([row for row in read_jsonl(folder / "metrics.jsonl") if "loss" in row] for folder in (one, two))
        for alone, together in zip(*steps, strict=True):
            assert together["loss"] == pytest.approx(alone["loss"], rel=1e-3), (name, alone["step"])
            assert together["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-3), (name, alone["step"])
        before, alone, together = (weights(folder) for folder in (tiny_model_dir, one / "model", two / "model"))
        for key, tensor in alone.items():
            torch.testing.assert_close(together[key], tensor, rtol=1e-3, atol=2e-5, msg=f"{name}: {key}")
        moved = max(float((alone[key] - before[key]).abs().max()) for key in alone if key in before)
        assert moved > 1e-3, name
