"""Sharded training on CPUs, over gloo, by the commands and configurations that GPUs take.

accelerate turns FSDP2 and DeepSpeed on for GPUs only. `shard_on_cpus` has its state say what it would say there; from
then on everything is the libraries' own path.
"""

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

REPOSITORY = Path(__file__).parent.parent
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed: pip install -e '.[deepspeed]'"
)
SHARDINGS = ["fsdp2", pytest.param("zero3", marks=needs_deepspeed)]


def is_asked_for() -> bool:
    """Whether a launcher has asked this process to shard."""
    return any(os.environ.get(name) == "true" for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"))


def small_config(sharding: str, folder: Path, processes: int = 2, **changes: Any) -> Path:
    """The shipped configuration of accelerate for so many processes, with other changes, in a file of its own."""
    config = yaml.safe_load((REPOSITORY / f"recipes/accelerate/{sharding}.yaml").read_text())
    path = folder / f"{sharding}.yaml"
    path.write_text(yaml.safe_dump({**config, "num_processes": processes, **changes}))
    return path


def shard_on_cpus() -> None:
    """Let accelerate shard in this process as its launcher asked it to."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    initialize = AcceleratorState.__init__

    def initialize_as_on_gpus(
        self: Any, *words: Any, fsdp_plugin: Any = None, deepspeed_plugin: Any = None, **options: Any
    ) -> None:
        initialize(self, *words, **options)
        if deepspeed_plugin is not None:
            _turn_deepspeed_on(self, deepspeed_plugin)
        elif fsdp_plugin is not None:
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
        PartialState._shared_state["distributed_type"] = self.distributed_type

    AcceleratorState.__init__ = initialize_as_on_gpus  # type: ignore[method-assign]


def _turn_deepspeed_on(state: Any, plugin: Any) -> None:
    from accelerate.utils import DistributedType
    from deepspeed import comm

    comm.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    plugins = plugin if isinstance(plugin, dict) else {"default": plugin}
    for each in plugins.values():
        each.set_mixed_precision(state._mixed_precision)
    next(iter(plugins.values())).select(_from_accelerator_state=True)
    state.deepspeed_plugins = plugins
    state.distributed_type, state._mixed_precision = DistributedType.DEEPSPEED, "no"
