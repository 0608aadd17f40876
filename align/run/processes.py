"""Which of the run's processes this is. Without `accelerate launch` there is one, and everything here is free."""

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TypeVar

from align.errors import InputError

T = TypeVar("T")
PATIENCE = timedelta(hours=12)
"""How long a process waits for the others. The launcher ends them all when one dies, so this only bounds slow work."""


def number_in_environment(name: str, default: int) -> int:
    """A whole number that a launcher has put into an environment variable.

    Raises:
        InputError: something else stands there.
    """
    text = os.environ.get(name) or str(default)
    if not text.isdecimal():
        raise InputError(
            f"{name}: this environment variable must be a whole number, and is {text!r}; unset it (launchers set it)"
        )
    return int(text)


def rank() -> int:
    """This process's number, 0 first."""
    return number_in_environment("RANK", 0)


def world_size() -> int:
    """How many processes the run has."""
    return number_in_environment("WORLD_SIZE", 1)


def is_first() -> bool:
    """True in the one process that logs and publishes."""
    return rank() == 0


def is_kept_off_gpus() -> bool:
    """Whether `ACCELERATE_USE_CPU` says to leave GPUs alone."""
    return os.environ.get("ACCELERATE_USE_CPU", "").lower() in {"1", "true", "yes"}


def on_cpu() -> bool:
    """Whether the run keeps off GPUs: there is none, or `ACCELERATE_USE_CPU` is set."""
    if is_kept_off_gpus():
        return True
    import torch

    return not torch.cuda.is_available()


def connect() -> int:
    """Join the run's other processes, where that has not been done, and return how many there are together."""
    if world_size() == 1:
        return 1
    from accelerate import PartialState

    # Without `cpu` a PartialState in CPU processes believes each of them to be alone.
    return int(PartialState(cpu=on_cpu(), timeout=PATIENCE).num_processes)


def disconnect() -> None:
    """Leave the run's other processes, with nothing under way between them.

    Without it, a process that ends while gloo's threads are still running is aborted now and then.
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


def share(items: Sequence[T]) -> Sequence[T]:
    """This process's items: every world-size-th, from its rank."""
    return items[rank() :: world_size()]


def decided_by_first(decide: Callable[[], T]) -> T:
    """What `decide` returns in the first process, in every process. Only the first calls it; call this in every one."""
    if connect() == 1:
        return decide()
    from accelerate.utils import broadcast_object_list

    decision: list[T] = broadcast_object_list([decide() if is_first() else None])
    return decision[0]
