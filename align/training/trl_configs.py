"""Our settings in TRL's terms, and how its trainers run here: the one file that knows the names of its configs.

Importing it brings TRL and torch in, so stages import it inside `run`.
"""

import dataclasses
import difflib
import functools
import importlib.metadata
import math
import os
import shutil
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from tqdm.auto import tqdm
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations import unset_hf_deepspeed_config
from trl import DPOConfig, RewardConfig, SFTConfig

from align.errors import FileProblems, InputError, NotFinite, Problem
from align.models.loading import default_device
from align.models.sharding import deepspeed_state
from align.run import processes
from align.run.artefacts import write_json_if_changed
from align.run.damaged_files import check_files
from align.run.reproducibility import derive_seed
from align.run.stage import Context
from align.run.tracking import Tracker
from align.settings.blocks import OptimizerBlock
from align.training.trl_options import CONFIGS, INSTEAD, OUT_OF_PLACE, TABLE

Config = TypeVar("Config", SFTConfig, RewardConfig, DPOConfig)

CHECKPOINTS = "checkpoint"
COMPLETE = "complete"
UNLOGGED = {"num_tokens", "total_flos"}
"""Counters that start from zero when a run is resumed: with them its figures would differ from an undisturbed one's."""


def training_config(kind: type[Config], context: Context, compute_dtype: torch.dtype, **own: Any) -> Config:
    """TRL's config for a stage whose settings have `optimizer`, `epochs` and `trl`.

    Args:
        own: options that the stage itself decides.

    Raises:
        InputError: a `trl` option that does not exist, has the wrong type, or is the pipeline's to set; a batch that
            cannot be divided among the processes.
    """
    stage, settings = context.stage, context.settings
    optimizer = settings.optimizer
    if optimizer.epsilon is not None:
        own = {**own, "adam_epsilon": optimizer.epsilon}
    check_options(kind, stage, settings.trl, own)
    on_gpu = default_device().type == "cuda"
    defaults: dict[str, Any] = {
        "activation_checkpointing": on_gpu,
        "dataloader_pin_memory": on_gpu,
        "ddp_find_unused_parameters": False,
        "disable_tqdm": False,
        "save_steps": 0.1,
    }
    decided: dict[str, Any] = {
        "output_dir": str(context.output / CHECKPOINTS),
        "seed": derive_seed(context.seed, stage) % 2**32,
        "use_cpu": not on_gpu,
        "bf16": compute_dtype == torch.bfloat16,
        "learning_rate": optimizer.learning_rate,
        "per_device_train_batch_size": optimizer.micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps(stage, optimizer, processes.world_size()),
        "lr_scheduler_type": _schedule(optimizer),
        # TRL reads 1 as one step; a warm-up as long as the run is the next number below.
        "warmup_steps": min(optimizer.warmup_ratio, math.nextafter(1, 0)),
        "weight_decay": optimizer.weight_decay,
        "max_grad_norm": optimizer.max_grad_norm,
        "num_train_epochs": settings.epochs,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "report_to": [],
        "remove_unused_columns": False,
        "save_strategy": "steps",
        "save_total_limit": 2,
    }
    # Else a configuration of accelerate that says bf16 would be heard where the recipe says fp32.
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if decided["bf16"] else "no"
    try:
        config = kind(**{**defaults, **settings.trl, **decided, **own})
    except (ValueError, TypeError, NotImplementedError, ImportError) as error:
        raise InputError(f"{stage}.trl: {error}") from error
    if config.deepspeed_plugin is not None:
        # Else transformers would load models in shards; here they are whole until a trainer has them.
        unset_hf_deepspeed_config()
    return config


def check_options(kind: type, stage: str, options: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Check a `trl` block's names and types against the config's fields, and report every fault.

    Raises:
        FileProblems: with the nearest right name, the type expected, or what to set instead.
    """
    fields = _option_types(kind)
    faults = ((name, _option_fault(fields, name, value, own)) for name, value in options.items())
    problems = [Problem(f"{stage}.trl.{name}", fault) for name, fault in faults if fault]
    if problems:
        raise FileProblems(f"{stage}.trl", problems)


def _option_fault(fields: Mapping[str, Any], name: str, value: Any, own: Mapping[str, Any]) -> str | None:
    if name in INSTEAD:
        return f"not set here; {INSTEAD[name]}"
    if name in OUT_OF_PLACE or name in own:
        return "the stage decides this itself; leave it out"
    if name not in fields:
        near = difflib.get_close_matches(name, fields, n=1)
        return "no such option" + (f"; did you mean `{near[0]}`?" if near else "")
    try:
        TypeAdapter(fields[name], config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value, strict=True)
    except ValidationError:
        return f"expected {_type_name(fields[name])}, got {value!r}"
    return None


@functools.cache
def _option_types(kind: type) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind) if field.init}


def _type_name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


def option_table() -> dict[str, Any]:
    """What `trl_options.json` holds: the versions, and each config's options with their types in plain words."""
    kinds = {kind.__name__: kind for kind in (SFTConfig, RewardConfig, DPOConfig)}
    versions = {name: importlib.metadata.version(name) for name in ("trl", "transformers")}
    options = {
        name: {option: _plain_type(hint) for option, hint in sorted(_option_types(kinds[name]).items())}
        for name in CONFIGS.values()
    }
    return {"versions": versions, "options": options}


def _plain_type(hint: Any) -> str:
    """Such as `float | None`; `other` for what recipes are not held to before the stage runs."""
    parts = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    names = ["None" if part is type(None) else getattr(part, "__name__", "") for part in parts]
    return (
        " | ".join(sorted(names, key="None".__eq__)) if {*names} <= {"bool", "int", "float", "str", "None"} else "other"
    )


def accumulation_steps(stage: str, optimizer: OptimizerBlock, world_size: int) -> int:
    """Micro-batches that each process takes to an optimizer step.

    Raises:
        InputError: the global batch is not a whole number of them.
    """
    at_once = optimizer.micro_batch_size * world_size
    if optimizer.batch_size % at_once:
        raise InputError(
            f"{stage}.optimizer.batch_size: {optimizer.batch_size} is not a multiple of micro_batch_size "
            f"{optimizer.micro_batch_size} times {world_size} processes = {at_once}; make batch_size a multiple of "
            f"{at_once}, or micro_batch_size smaller"
        )
    return optimizer.batch_size // at_once


def _schedule(optimizer: OptimizerBlock) -> str:
    if optimizer.schedule == "constant" and optimizer.warmup_ratio > 0:
        return "constant_with_warmup"
    return optimizer.schedule


@dataclass(frozen=True)
class Trained:
    """How a training run ended: optimizer steps done, and the last step's figures."""

    steps: int
    figures: Mapping[str, float]


def train(trainer: Trainer, stage: str, tracker: Tracker) -> Trained:
    """Train to the end, going on from the last whole checkpoint in the trainer's folder where there is one.

    Raises:
        NotFinite: a loss or gradient is NaN or infinite; the last checkpoint is kept.
        InputError: the checkpoint is damaged.
    """
    folder = Path(str(trainer.args.output_dir))
    checkpoint = last_checkpoint(folder)
    if checkpoint:
        check_files(checkpoint)
    if processes.is_first():
        _remove_unfinished(folder)
    tracker.truncate(checkpoint_step(checkpoint) if checkpoint else 0)
    processes.barrier()

    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    if processes.is_first() and not trainer.args.disable_tqdm:
        trainer.add_callback(LossBar(stage))
    trainer.add_callback(Follow(stage, tracker))
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    steps = [row for row in trainer.state.log_history if "loss" in row]
    last = {name: value for name, value in steps[-1].items() if name not in UNLOGGED | {"step"}} if steps else {}
    return Trained(trainer.state.global_step, last)


def whole_state(trainer: Trainer) -> dict[str, torch.Tensor] | None:
    """The model's whole state where processes hold shards of it (FSDP, ZeRO-3), else None. Every process calls it."""
    if trainer.is_deepspeed_enabled:
        # The trainer has had transformers build models in shards, and so wait for other processes, from now on.
        unset_hf_deepspeed_config()
        return deepspeed_state(trainer.accelerator.unwrap_model(trainer.model_wrapped))
    return trainer.accelerator.get_state_dict(trainer.model_wrapped) if trainer.is_fsdp_enabled else None


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end, or None."""
    whole = [path.parent for path in folder.glob(f"checkpoint-*/{COMPLETE}")]
    return max(whole, key=checkpoint_step, default=None)


def checkpoint_step(checkpoint: Path) -> int:
    """The optimizer step a checkpoint was written after."""
    return int(checkpoint.name.rpartition("-")[2])


def _remove_unfinished(folder: Path) -> None:
    for path in folder.glob("checkpoint-*"):
        if not (path / COMPLETE).exists():
            shutil.rmtree(path)


class Follow(TrainerCallback):
    """Logs each step's figures, stops at one that is not finite, and marks checkpoints that are whole."""

    def __init__(self, stage: str, tracker: Tracker) -> None:
        self.stage = stage
        self.tracker = tracker

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **_: Any,
    ) -> None:
        if not logs or "loss" not in logs:
            return
        for name in ("loss", "grad_norm"):
            if not math.isfinite(logs.get(name, 0.0)):
                raise NotFinite(not_finite(self.stage, name, logs[name], state.global_step, Path(str(args.output_dir))))
        self.tracker.log(state.global_step, {name: value for name, value in logs.items() if name not in UNLOGGED})

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        processes.barrier()
        if processes.is_first():
            (Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / COMPLETE).touch()


class LossBar(ProgressCallback):
    """TRL's progress bar with the time left, the loss beside it instead of a line of figures a step."""

    def __init__(self, stage: str) -> None:
        super().__init__()
        self.stage = stage

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        done = self.current_step = state.global_step
        self.training_bar = tqdm(total=state.max_steps, initial=done, desc=self.stage, dynamic_ncols=True)

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, logs: Mapping[str, float] | None = None, **_: Any
    ) -> None:
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{logs['loss']:.4g}")


def not_finite(stage: str, name: str, value: float, step: int, folder: Path, where: str = "") -> str:
    """The message for a figure that is NaN or infinite."""
    checkpoint = last_checkpoint(folder)
    kept = f"the checkpoint of step {checkpoint_step(checkpoint)} is kept" if checkpoint else "no checkpoint was due"
    return (
        f"{stage}: {name} is {value} at step {step}{where}. The run stopped; {kept}. "
        f"Try a lower `{stage}.optimizer.learning_rate`; with the recipe as it is, the same command goes on from there."
    )


def with_labels(
    collate: Callable[[list[Any]], Any],
) -> Callable[[list[Any]], dict[str, Any]]:
    """A collator that adds the pairs' soft labels, `probability` (B,), and `weight` (B,) to what `collate` makes."""

    def collate_pairs(rows: list[Any]) -> dict[str, Any]:
        labels = {
            "probability": [row["probability"] for row in rows],
            "weight": [float(row.get("weight", 1)) for row in rows],
        }
        return {**collate(rows), **{name: torch.tensor(values) for name, values in labels.items()}}

    return collate_pairs


if __name__ == "__main__":
    write_json_if_changed(TABLE, option_table())
