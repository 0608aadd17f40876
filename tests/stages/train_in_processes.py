"""Runs training stages on hand-made upstreams, in as many processes as it is launched in. Started by tests.

Its one argument is JSON: `[model, inputs, jobs, interrupt_after]`, each job `[stage, settings, output, options]`. With
`interrupt_after` each is broken off after so many steps, and run again.
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
    """A training run was broken off on purpose."""


def interrupt_after(steps: int | None) -> None:
    """Have training runs break off once they have taken so many steps; None lets them go on."""
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
            GradientState._reset_state()  # as a new process would find it
        run(stage, settings, Path(model), Path(output), folders, **options)
    processes.disconnect()


if __name__ == "__main__":
    main()
