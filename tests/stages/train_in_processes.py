"""Run training stages on hand-made upstreams, in all processes of the launch. Started by tests.

Its one argument is JSON: `[model, inputs, jobs, interrupt_after]`, each job `[stage, settings, output, options]`. With
`interrupt_after` each job is interrupted after that many steps, and run again.
"""

import json
import sys
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from accelerate.state import GradientState

from align.run import processes
from tests import sharding
from tests.stages.training import run


class Interrupted(Exception):
    """A training run was interrupted on purpose."""


def interrupt_after(steps: int | None) -> None:
    """Have training runs stop after that many steps; None lets them finish."""
    from align.training.callbacks import TrackingCallback

    def stop(self: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == steps:
            raise Interrupted

    TrackingCallback.on_step_begin = stop  # type: ignore[method-assign]


def main() -> None:
    model, inputs, jobs, steps = json.loads(sys.argv[1])
    folders = {folder.name: folder for folder in Path(inputs).iterdir()}
    if sharding.is_asked_for():
        sharding.shard_on_cpus()
    for name, settings, output, options in jobs:
        stage = import_module(f"align.stages.{name}").STAGE
        processes.barrier()
        if steps:
            interrupt_after(steps)
            with suppress(Interrupted):
                run(stage, settings, Path(model), Path(output), folders, **options)
                raise AssertionError(f"{name} was not interrupted")
            interrupt_after(None)
            GradientState._reset_state()  # as in a new process
        run(stage, settings, Path(model), Path(output), folders, **options)
    processes.disconnect()


if __name__ == "__main__":
    main()
