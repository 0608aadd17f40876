"""What is logged, shown and marked while one of TRL's trainers runs, and where training resumes."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerCallback, TrainerState, TrainingArguments

from align.errors import NotFinite
from align.run import processes
from align.run.tracking import Tracker

Logs = Mapping[str, float] | None

COMPLETE = "complete"
"""Name of the empty file that marks a checkpoint as written to its end."""

UNLOGGED = {"num_tokens", "total_flos"}
"""Counters that restart at zero when a run resumes; an uninterrupted run would log other values."""


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint in a folder, or None."""
    complete = [path.parent for path in folder.glob(f"checkpoint-*/{COMPLETE}")]
    return max(complete, key=checkpoint_step, default=None)


def checkpoint_step(checkpoint: Path) -> int:
    """The optimizer step after which a checkpoint was written."""
    return int(checkpoint.name.rpartition("-")[2])


def not_finite_message(stage: str, name: str, value: float, step: int, folder: Path, where: str = "") -> str:
    """The error message for a figure that is NaN or infinite."""
    checkpoint = last_checkpoint(folder)
    kept = f"the checkpoint of step {checkpoint_step(checkpoint)} is kept" if checkpoint else "no checkpoint was due"
    return (
        f"{stage}: {name} is {value} at step {step}{where}. The run stopped; {kept}. "
        f"Try a lower `{stage}.optimizer.learning_rate`; with an unchanged recipe the same command resumes from there."
    )


class TrackingCallback(TrainerCallback):
    """Logs each step's figures, stops at one that is not finite, and marks complete checkpoints."""

    def __init__(self, stage: str, tracker: Tracker) -> None:
        self.stage = stage
        self.tracker = tracker

    def on_log(self, args: TrainingArguments, state: TrainerState, control: Any, logs: Logs = None, **_: Any) -> None:
        if not logs or "loss" not in logs:
            return
        step, folder = state.global_step, Path(str(args.output_dir))
        for name in ("loss", "grad_norm"):
            if not math.isfinite(logs.get(name, 0.0)):
                raise NotFinite(not_finite_message(self.stage, name, logs[name], step, folder))
        self.tracker.log(step, {name: value for name, value in logs.items() if name not in UNLOGGED})

    def on_save(self, args: TrainingArguments, state: TrainerState, control: Any, **_: Any) -> None:
        processes.barrier()
        if processes.is_first():
            (Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / COMPLETE).touch()


class LossProgressCallback(ProgressCallback):
    """A progress bar with the time left and the current loss, in place of TRL's line of figures for each step."""

    def __init__(self, stage: str) -> None:
        super().__init__()
        self.stage = stage

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        done = self.current_step = state.global_step
        self.training_bar = tqdm(total=state.max_steps, initial=done, desc=self.stage, dynamic_ncols=True)

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Logs = None, **_: Any) -> None:
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{logs['loss']:.4g}")
