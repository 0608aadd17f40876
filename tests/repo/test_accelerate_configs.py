"""accelerate reads every key of the shipped configurations; it silently drops unknown keys of their inner blocks."""

from pathlib import Path
from typing import Any

import pytest
import yaml

CONFIGS = sorted((Path(__file__).parent.parent.parent / "recipes/accelerate").glob("*.yaml"))


def launched(config: Path) -> Any:
    """The arguments that `accelerate launch` derives from a configuration."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    words = ["--config_file", str(config), "-m", "align"]
    return _validate_launch_command(launch_command_parser().parse_args(words))[0]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_knows_every_key_and_takes_its_value(config: Path) -> None:
    arguments = vars(launched(config))
    blocks = yaml.safe_load(config.read_text())
    inner = {key: value for block in blocks.values() if isinstance(block, dict) for key, value in block.items()}
    assert {name: arguments.get(name, "no such option") for name in inner} == inner
    assert arguments["mixed_precision"] == blocks["mixed_precision"]
    assert arguments["num_processes"] == blocks["num_processes"]


def test_fsdp2_shards_every_layer_and_loads_models_in_every_process(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.launch import prepare_multi_gpu_env

    [config] = (path for path in CONFIGS if path.stem == "fsdp2")
    for name, value in prepare_multi_gpu_env(launched(config)).items():
        monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert (plugin.fsdp_version, plugin.reshard_after_forward) == (2, True)
    assert getattr(plugin.auto_wrap_policy, "__name__", "") == "transformer_auto_wrap_policy"
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"
    assert not plugin.cpu_ram_efficient_loading
