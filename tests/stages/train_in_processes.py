"""Runs training stages on hand-made upstreams, in as many processes as it is launched in. Started by tests.

Its one argument is JSON: `[model, inputs, output, lora, {stage: settings}]`.
"""

import json
import sys
from importlib import import_module
from pathlib import Path

from align import processes
from tests.stages.training import run


def main() -> None:
    model, inputs, output, lora, stages = json.loads(sys.argv[1])
    folders = {folder.name: folder for folder in Path(inputs).iterdir()}
    for name, settings in stages.items():
        stage = import_module(f"align.stages.{name}").STAGE
        processes.barrier()
        run(stage, settings, Path(model), Path(output) / name, folders, lora=lora)


if __name__ == "__main__":
    main()
