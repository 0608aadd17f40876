"""Runs in two real processes, by the commands that users type."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.fakes import FAKES

ACCELERATE = shutil.which("accelerate", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
TYPED = [str(ACCELERATE), "launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0", "-m"]
TRAP = [str(ACCELERATE), "launch", "--cpu", "--num_processes", "2", "-m"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "recipe.yaml").write_text("letters: {}\ncapitals: {}\n")
    return tmp_path


def align(folder: Path, *words: str, launcher: list[str] | None = None) -> subprocess.CompletedProcess[str]:
    program = launcher or [sys.executable, "-m"]
    path = os.pathsep.join([str(FAKES), os.environ["PYTHONPATH"]])
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(
        [*program, "align", *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )


def published(folder: Path, stage: str) -> dict[str, object]:
    return dict(json.loads((folder / f"runs/recipe/shared/{stage}/manifest.json").read_text()))


def test_launch_runs_a_stage_in_two_processes_and_logs_once(folder: Path) -> None:
    done = align(folder, "launch", "letters", "--recipe", "recipe.yaml", "--nproc", "2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("letters: done in") == 1
    assert published(folder, "letters")["processes"] == 2


def test_launch_runs_one_process_by_the_accelerate_command_it_prints(folder: Path) -> None:
    done = align(folder, "launch", "letters", "--recipe", "recipe.yaml")
    assert done.returncode == 0, done.stderr
    assert "accelerate launch --cpu --num_processes 1 " in done.stdout.splitlines()[0]
    assert published(folder, "letters")["processes"] == 1
    failed = align(folder, "launch", "letters", "--recipe", "recipe.yaml", "--set", "letters.fail=input")
    assert (failed.returncode, failed.stderr) == (2, "letters.txt, line 3: not a letter; mend it\n")


def test_a_recipe_runs_in_two_processes_what_can_use_them(folder: Path) -> None:
    done = align(folder, "run", "recipe.yaml", "--nproc", "2")
    assert done.returncode == 0, done.stderr
    assert (published(folder, "letters")["processes"], published(folder, "capitals")["processes"]) == (2, 1)
    assert (folder / "runs/recipe/shared/capitals/capitals.txt").read_text() == "ABC 0"


def test_the_command_typed_by_hand_runs_too(folder: Path) -> None:
    done = align(folder, "run", "letters", "--recipe", "recipe.yaml", launcher=TYPED)
    assert done.returncode == 0, done.stderr
    assert published(folder, "letters")["processes"] == 2


def test_the_command_that_silently_starts_one_process_is_refused(folder: Path) -> None:
    done = align(folder, "run", "letters", "--recipe", "recipe.yaml", launcher=TRAP)
    assert done.returncode != 0
    assert "2 processes were requested, but 1 started" in done.stderr
    assert not (folder / "runs").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_fails_ends_the_run_at_once_and_its_error_is_printed_once(folder: Path, rank: int) -> None:
    start = time.monotonic()
    options = ["--set", "letters.fail=input", "--set", f"letters.fail_in={rank}"]
    done = align(folder, "launch", "letters", "--recipe", "recipe.yaml", "--nproc", "2", *options)
    assert done.returncode == 2
    assert done.stderr.count("letters.txt, line 3: not a letter; mend it") == 1
    assert done.stderr.endswith("letters.txt, line 3: not a letter; mend it\n")
    assert "Traceback" not in done.stderr and "ChildFailedError" not in done.stderr
    assert time.monotonic() - start < 60
    assert not (folder / "runs/recipe/shared/letters").exists()


def test_under_accelerate_launch_the_error_is_printed_once_and_ends_the_launchers_page(folder: Path) -> None:
    (folder / "recipe.yaml").write_text("letters: {textt: a}\n")
    done = align(folder, "run", "letters", "--recipe", "recipe.yaml", launcher=TYPED)
    assert done.returncode != 0
    before, page = done.stderr.split("Traceback", 1)
    assert before.count("no such setting; did you mean `text`?") == 1, before
    assert page.strip().splitlines()[-2].endswith("no such setting; did you mean `text`?")


def test_two_processes_make_the_same_samples_as_one(tmp_path: Path, tiny_model_dir: Path, tiny_prompts: Path) -> None:
    recipe = {
        "model": {"path": str(tiny_model_dir), "precision": "fp32"},
        "prompts": {"sources": [{"path": str(tiny_prompts)}]},
        "sample": {"sampling": {"max_new_tokens": 12, "batch_size": 4}},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    for number, name in (("1", "one"), ("2", "two")):
        done = align(tmp_path, "run", "recipe.yaml", "--nproc", number, "--set", f"output={name}")
        assert done.returncode == 0, done.stderr
    one, two = (tmp_path / name / "recipe/shared/sample" for name in ("one", "two"))
    assert (one / "samples.jsonl").read_bytes() == (two / "samples.jsonl").read_bytes()
    assert json.loads((two / "manifest.json").read_text())["processes"] == 2
