"""This process's place among the run's processes. Without `accelerate launch` there is one, and all of this is free."""

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TypeVar

from align.errors import InputError

T = TypeVar("T")
TIMEOUT = timedelta(hours=12)
"""How long a process waits for the others. The launcher ends all of them when one dies, so only slow work needs it."""


def number_in_environment(name: str, default: int) -> int:
    """The whole number in an environment variable that launchers set.

    Raises:
        InputError: the variable holds something else.
    """
    text = os.environ.get(name) or str(default)
    if not text.isdecimal():
        raise InputError(
            f"{name}: this environment variable must be a whole number, but is {text!r}; unset it (launchers set it)"
        )
    return int(text)


def is_set(name: str) -> bool:
    """Whether an environment variable says yes."""
    return os.environ.get(name, "").lower() in {"1", "true", "yes"}


def rank() -> int:
    """This process's rank, from 0."""
    return number_in_environment("RANK", 0)


def world_size() -> int:
    """How many processes the run has."""
    return number_in_environment("WORLD_SIZE", 1)


def is_first() -> bool:
    """Whether this is rank 0, the one process that logs and publishes."""
    return rank() == 0


def is_forced_onto_cpu() -> bool:
    """Whether `ACCELERATE_USE_CPU` forbids the use of GPUs."""
    return is_set("ACCELERATE_USE_CPU")


def on_cpu() -> bool:
    """Whether the run uses no GPU: there is none, or `ACCELERATE_USE_CPU` is set."""
    if is_forced_onto_cpu():
        return True
    import torch

    return not torch.cuda.is_available()


def connect() -> int:
    """Join the run's process group, unless this process has already done so, and return the number of processes."""
    if world_size() == 1:
        return 1
    from accelerate import PartialState

    # Without `cpu`, a PartialState in a CPU process takes that process to be the only one.
    return int(PartialState(cpu=on_cpu(), timeout=TIMEOUT).num_processes)


def disconnect() -> None:
    """Leave the process group once every process has arrived here.

    Without it, a process that exits while gloo's threads are still running is sometimes aborted.
    """
    if world_size() == 1:
        return
    from torch import distributed

    if distributed.is_initialized():
        barrier()
        distributed.destroy_process_group()


def barrier() -> None:
    """Wait for every process."""
    if connect() > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()


def shard(items: Sequence[T]) -> Sequence[T]:
    """This process's items: every `world_size()`-th, starting at its rank."""
    return items[rank() :: world_size()]


def decide_on_first_rank(decide: Callable[[], T]) -> T:
    """Call `decide` on the first rank and return its result on all. Every process must call this function."""
    if connect() == 1:
        return decide()
    from accelerate.utils import broadcast_object_list

    decision: list[T] = broadcast_object_list([decide() if is_first() else None])
    return decision[0]
