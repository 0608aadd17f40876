"""A whole pipeline small enough for tests, by the real command: a tiny model that ends its turns, and its recipe."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import END, build_tiny_model, build_tiny_prompts

TIMEOUT = 240
CONSTITUTION = """\
title: The letter {letter}
principles:
  - id: has-{letter}
    text: Use the letter {letter}.
    opposite: Never use the letter {letter}.
    rule: {{contains: {letter}}}
"""


GOLD = """\
def letters(prompts, completions):
    return [sum(character.isalpha() for character in completion) for completion in completions]
"""


def build_speaking_model(directory: Path) -> Path:
    """A tiny random model that writes words in small letters and ends most turns within eight tokens.

    One hidden direction is the same for every token, so that the output weights along it are a bias of each token.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    build_tiny_model(directory, tie_word_embeddings=False, initializer_range=0.1)
    model = AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    bias = torch.full((len(tokenizer),), -4.0)
    for token, number in tokenizer.get_vocab().items():
        word = token.replace("Ġ", "")
        if word.isascii() and word.isalpha() and word.islower():
            bias[number] = 0.0
    bias[tokenizer.convert_tokens_to_ids(END)] = 1.8
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 2.0
        model.lm_head.weight[:, 0] = bias
    model.save_pretrained(directory)
    return directory


def optimizer(**changes: Any) -> dict[str, Any]:
    return {"learning_rate": 1e-3, "batch_size": 8, "micro_batch_size": 8, **changes}


def recipe(model: Path, prompts: Path, constitution: Path) -> dict[str, Any]:
    """From prompts to evaluated policies; every stage with several chunks, steps or iterations to be interrupted in."""
    sampling = {"max_new_tokens": 8, "batch_size": 4}
    return {
        "seed": 5,
        "model": {"path": str(model), "precision": "fp32", "lora": {"r": 4, "alpha": 8}},
        "constitution": str(constitution),
        "prompts": {
            "sources": [{"path": str(prompts)}],
            "split": {"sft": 0.4, "preference": 0.3, "rl": 0.2, "eval": 0.1},
        },
        "judge": {"kind": "rule"},
        "sample": {"sampling": sampling, "splits": ["sft"]},
        "revise": {"sampling": sampling, "rounds": 2, "examples": 0},
        "sft": {
            "helpful": {"harmless": ["benign", "odd"]},
            "optimizer": optimizer(batch_size=2, micro_batch_size=2),
            "epochs": 4,
            "trl": {"save_steps": 2},
        },
        "compare": {"sampling": sampling, "completions": 3},
        "dpo": {"optimizer": optimizer()},
        "reward": {
            "optimizer": optimizer(batch_size=2, micro_batch_size=2),
            "held_out": 0.2,
            "trl": {"save_steps": 2},
        },
        "ppo": {
            "ptx_coef": 0.1,
            "rewards": [{"stage": "reward"}, {"function": "gold_letters:letters", "gold": True}],
            "iterations": 4,
            "rollout_batch": 16,
            "epochs": 2,
            "optimizer": optimizer(learning_rate=3e-3),
            "sampling": {"max_new_tokens": 8, "batch_size": 8},
            "checkpoint_every": 1,
        },
        "evaluate": {"policies": ["base", "sft", "ppo"], "best_of": 4, "sampling": sampling, "bootstrap": 50},
    }


@dataclass(frozen=True)
class Run:
    """A folder with a recipe, and the runs made of it there."""

    root: Path

    @property
    def shared(self) -> Path:
        return self.root / "runs/tiny/shared"

    @property
    def own(self) -> Path:
        """The run of the constitution, where there is one constitution alone."""
        [folder] = (path for path in (self.root / "runs/tiny").iterdir() if path.name.startswith("letter-"))
        return folder

    def stage(self, name: str) -> Path:
        return (self.shared if name == "sample" else self.own) / name

    def manifest(self, name: str) -> dict[str, Any]:
        return dict(json.loads((self.stage(name) / "manifest.json").read_text()))

    def rows(self, path: str) -> list[dict[str, Any]]:
        stage, _, name = path.partition("/")
        return rows(self.stage(stage) / name)

    def copy(self, root: Path, without: Sequence[str] = ()) -> "Run":
        """A copy of everything but the results of some stages."""
        shutil.copytree(self.root, root, dirs_exist_ok=True)
        copied = Run(root)
        for name in without:
            shutil.rmtree(copied.stage(name))
        return copied

    def start(self, *words: str, **environment: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-m", "align", *words],
            cwd=self.root,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def align(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run the command to its end, whatever that is."""
        with self.start(*words, **environment) as process:
            try:
                out, error = process.communicate(timeout=TIMEOUT)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
        return subprocess.CompletedProcess(process.args, process.returncode, out, error)

    def make(self, *words: str) -> str:
        """Run the command, which must succeed; what it printed."""
        done = self.align(*words)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def run_stage(self, stage: str, *words: str, **changes: Any) -> str:
        """Run a stage with changed settings, which may replace a model. They are given as `block__key=value`."""
        overrides = [
            word
            for key, value in changes.items()
            for word in ("--set", f"{key.replace('__', '.')}={json.dumps(value)}")
        ]
        return self.make("run", stage, "--recipe", "tiny.yaml", "--force", *overrides, *words)

    def kill_when(self, moment: Callable[[], bool], *words: str) -> bool:
        """Start the command and kill it outright at the moment; whether it was alive until then."""
        process = self.start(*words)
        deadline = time.monotonic() + TIMEOUT
        while process.poll() is None and time.monotonic() < deadline:
            if moment():
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.002)
        process.communicate(timeout=TIMEOUT)
        return process.returncode == -signal.SIGKILL


def build_run(root: Path) -> Run:
    """A folder with the model, the prompts, the constitution and the recipe; nothing has run yet."""
    model = build_speaking_model(root / "models/tiny")
    prompts = build_tiny_prompts(root / "prompts.jsonl", 96)
    constitution = root / "letter.yaml"
    constitution.write_text(CONSTITUTION.format(letter="e"))
    (root / "gold_letters.py").write_text(GOLD)
    names = (path.relative_to(root) for path in (model, prompts, constitution))
    (root / "tiny.yaml").write_text(json.dumps(recipe(*names)))
    return Run(root)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def in_process(folder: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """The command without a Python of its own, which takes seconds to start; its exit code."""
    from align.__main__ import main

    monkeypatch.chdir(folder)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return main(words)


def weights(folder: Path) -> Mapping[str, Any]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")
