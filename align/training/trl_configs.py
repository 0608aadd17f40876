"""The recipe's training settings as configs of TRL: the one module that knows the names of TRL's options.

Importing it loads TRL and torch, so stages import it inside `run`. `python -m align.training.trl_configs` rewrites
`trl_options.json`.
"""

import dataclasses
import functools
import importlib.metadata
import math
import os
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch.optim import SGD
from transformers import TrainingArguments, get_scheduler
from transformers.integrations import unset_hf_deepspeed_config
from trl import DPOConfig, RewardConfig, SFTConfig

from align.errors import FileProblems, InputError, Problem, first_line
from align.models.loading import default_device
from align.run import processes
from align.run.artefacts import write_json_if_changed
from align.run.reproducibility import derive_seed
from align.run.stage import Context
from align.settings.blocks import OptimizerBlock
from align.training.trl_options import CONFIGS, TABLE, option_faults

ConfigT = TypeVar("ConfigT", SFTConfig, RewardConfig, DPOConfig)

CHECKPOINTS = "checkpoint"


def training_config(
    config_class: type[ConfigT], context: Context, compute_dtype: torch.dtype, **stage_options: Any
) -> ConfigT:
    """TRL's config for a stage whose settings have `optimizer`, `epochs` and `trl`.

    Args:
        stage_options: options that the stage itself decides.

    Raises:
        InputError: a `trl` option does not exist, has the wrong type, or is decided elsewhere; or the batch cannot be
            divided among the processes.
    """
    stage, given = context.stage, context.settings.trl
    check_options(config_class, stage, given)
    on_gpu = default_device().type == "cuda"
    defaults: dict[str, Any] = {
        "activation_checkpointing": on_gpu,
        "dataloader_pin_memory": on_gpu,
        "ddp_find_unused_parameters": False,
        "disable_tqdm": False,
        "save_steps": 0.1,
    }
    fixed = {**_recipe_options(context), "use_cpu": not on_gpu, "bf16": compute_dtype == torch.bfloat16}
    # Otherwise a configuration of accelerate that asks for bf16 would override a recipe that asks for fp32.
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if fixed["bf16"] else "no"
    try:
        config = config_class(**{**defaults, **given, **fixed, **stage_options})
    except (ValueError, TypeError, NotImplementedError, ImportError) as error:
        raise InputError(f"{stage}.trl: {error}") from error
    _check_schedule(stage, config)
    if config.deepspeed_plugin is not None:
        # Otherwise transformers would load models in shards; here a model stays whole until a trainer has it.
        unset_hf_deepspeed_config()
    return config


def _check_schedule(stage: str, config: TrainingArguments) -> None:
    """Build the schedule once, for an optimizer of one number: each schedule has options of its own.

    Raises:
        InputError: the schedule does not have one of its options.
    """
    options = config.lr_scheduler_kwargs
    try:
        get_scheduler(config.lr_scheduler_type, SGD([torch.zeros(1)], 1.0), 1, 2, scheduler_specific_kwargs=options)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{stage}.trl.lr_scheduler_kwargs: {options} do not fit the schedule `{config.lr_scheduler_type.value}` "
            f"({first_line(error)}); correct or remove them"
        ) from None


def _recipe_options(context: Context) -> dict[str, Any]:
    """The options that follow from the recipe, and those that are the same for every stage."""
    stage, optimizer = context.stage, context.settings.optimizer
    return {
        "output_dir": str(context.output / CHECKPOINTS),
        "seed": derive_seed(context.seed, stage) % 2**32,
        "learning_rate": optimizer.learning_rate,
        "per_device_train_batch_size": optimizer.micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps(stage, optimizer, processes.world_size()),
        "lr_scheduler_type": _schedule(optimizer),
        # TRL reads 1 as one step, so a warm-up over the whole run is the largest float below 1.
        "warmup_steps": min(optimizer.warmup_ratio, math.nextafter(1, 0)),
        "weight_decay": optimizer.weight_decay,
        "max_grad_norm": optimizer.max_grad_norm,
        "num_train_epochs": context.settings.epochs,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "report_to": [],
        "remove_unused_columns": False,
        "save_strategy": "steps",
        "save_total_limit": 2,
        **_epsilon(context),
    }


def _epsilon(context: Context) -> dict[str, float]:
    """Adam's epsilon, if the recipe's optimizer block names it; otherwise it is the `trl` block's or TRL's own.

    Raises:
        InputError: both blocks name it.
    """
    epsilon = context.settings.optimizer.epsilon
    if epsilon is None:
        return {}
    if "adam_epsilon" in context.settings.trl:
        raise InputError(f"{context.stage}.trl.adam_epsilon: optimizer.epsilon is set as well; remove one of the two")
    return {"adam_epsilon": epsilon}


def check_options(config_class: type, stage: str, options: Mapping[str, Any]) -> None:
    """Check a `trl` block's names and types against the config's fields, and report every fault.

    Raises:
        FileProblems: with the most similar name, the expected type, or what to set instead.
    """
    if faults := option_faults(stage, options, _option_types(config_class)):
        raise FileProblems(f"{stage}.trl", [Problem(f"{stage}.trl.{name}", fault) for name, fault in faults.items()])


@functools.cache
def _option_types(config_class: type) -> dict[str, Any]:
    hints = typing.get_type_hints(config_class)
    return {field.name: hints[field.name] for field in dataclasses.fields(config_class) if field.init}


def option_table() -> dict[str, Any]:
    """The content of `trl_options.json`: library versions, and each config's options with their types as text."""
    classes = {each.__name__: each for each in (SFTConfig, RewardConfig, DPOConfig)}
    versions = {name: importlib.metadata.version(name) for name in ("trl", "transformers")}
    options = {
        name: {option: _plain_type(hint) for option, hint in sorted(_option_types(classes[name]).items())}
        for name in CONFIGS.values()
    }
    return {"versions": versions, "options": options}


def _plain_type(hint: Any) -> str:
    """A type as text, such as `float | None`; `other` for one that is only checked once the stage runs."""
    parts = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    names = ["None" if part is type(None) else getattr(part, "__name__", "") for part in parts]
    return (
        " | ".join(sorted(names, key="None".__eq__)) if {*names} <= {"bool", "int", "float", "str", "None"} else "other"
    )


def accumulation_steps(stage: str, optimizer: OptimizerBlock, world_size: int) -> int:
    """The number of micro-batches that each process runs for an optimizer step.

    Raises:
        InputError: the global batch is not a whole number of micro-batches of all processes.
    """
    at_once = optimizer.micro_batch_size * world_size
    if optimizer.batch_size % at_once:
        raise InputError(
            f"{stage}.optimizer.batch_size: {optimizer.batch_size} is not a multiple of micro_batch_size "
            f"{optimizer.micro_batch_size} times {world_size} processes = {at_once}; make batch_size a multiple of "
            f"{at_once}, or lower micro_batch_size"
        )
    return optimizer.batch_size // at_once


def _schedule(optimizer: OptimizerBlock) -> str:
    if optimizer.schedule == "constant" and optimizer.warmup_ratio > 0:
        return "constant_with_warmup"
    return optimizer.schedule


if __name__ == "__main__":
    write_json_if_changed(TABLE, option_table())
