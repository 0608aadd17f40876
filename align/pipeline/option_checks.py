"""Checks the options that a recipe passes on to TRL."""

from collections.abc import Mapping
from typing import Any

from align.errors import Problem
from align.pipeline.recipe_files import RawRecipe
from align.settings.blocks import OptimizerBlock
from align.training.trl_options import CONFIGS, option_faults, schedule_fault


def option_problems(raw: RawRecipe) -> list[Problem]:
    """Faulty `trl` options. They are checked in the raw content, so that blocks with other faults are covered too."""
    blocks = {name: raw.content.get(name) for name in CONFIGS}
    given = {name: block["trl"] for name, block in blocks.items() if isinstance(block, dict) and "trl" in block}
    return [
        raw.problem((name, "trl", option), fault)
        for name, options in given.items()
        if isinstance(options, dict)
        for option, fault in {**_schedule_faults(blocks[name], options), **option_faults(name, options)}.items()
    ]


def _schedule_faults(block: Any, options: Mapping[str, Any]) -> dict[str, str]:
    """A scheduler's option that the recipe's schedule does not have."""
    optimizer, default = block.get("optimizer"), OptimizerBlock.model_fields["schedule"].default
    schedule = optimizer.get("schedule", default) if isinstance(optimizer, dict) else default
    fault = schedule_fault(options.get("lr_scheduler_kwargs"), str(schedule))
    return {"lr_scheduler_kwargs": fault} if fault else {}
