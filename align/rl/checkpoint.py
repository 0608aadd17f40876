"""Resumable state of a PPO run: trained parameters, optimizer state and the few numbers that nothing else determines.

Everything random derives from the recipe's seed and the iteration, so no generator has a state to keep.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from align import processes

FOLDER = "checkpoint"
_TRAINED = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True, strict=False)


def save(output: Path, iteration: int, model: torch.nn.Module, optimizer: Any, numbers: dict[str, Any]) -> None:
    """Write the state after `iteration` iterations, then remove the checkpoint before it. Call in every process."""
    parameters = get_model_state_dict(model, options=_TRAINED)
    state = get_optimizer_state_dict(model, optimizer, options=_TRAINED)
    if processes.is_first():
        final = output / FOLDER / f"iteration-{iteration:06d}"
        temporary = final.with_name(f".{final.name}")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        torch.save({"parameters": parameters, "optimizer": state}, temporary / "state.pt")
        (temporary / "numbers.json").write_text(json.dumps({"iteration": iteration, **numbers}))
        os.replace(temporary, final)
        for earlier in sorted(final.parent.glob("iteration-*"))[:-1]:
            shutil.rmtree(earlier)
    processes.barrier()


def restore(output: Path, model: torch.nn.Module, optimizer: Any) -> dict[str, Any] | None:
    """Load the newest checkpoint into model and optimizer; its numbers, or None where there is no checkpoint."""
    saved = sorted((output / FOLDER).glob("iteration-*"))
    if not saved:
        return None
    # Mapped, so that the processes of one machine share the pages that they read.
    state = torch.load(saved[-1] / "state.pt", map_location="cpu", weights_only=True, mmap=True)
    set_model_state_dict(model, state["parameters"], options=_TRAINED)
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=_TRAINED)
    numbers: dict[str, Any] = json.loads((saved[-1] / "numbers.json").read_text())
    return numbers


def whole_state(model: torch.nn.Module, prefix: str) -> dict[str, torch.Tensor]:
    """The full state of the submodule whose names start with `prefix`, on the CPU. Call in every process."""
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    named = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    return {name: tensor for name, tensor in named.items() if isinstance(tensor, torch.Tensor)}
