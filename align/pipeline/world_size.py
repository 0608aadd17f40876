"""Checks that the run has the number of processes that was requested, and an accelerate configuration it can use.

`accelerate launch --cpu --num_processes 2` silently starts one process; a run would then train on other batches than
its recipe says. Therefore the requested number is looked up and compared with the number of processes that joined.
"""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from align.errors import InputError, WorldSizeError, first_line
from align.run import processes
from align.settings.yaml_files import load_yaml

PROCESSES_VARIABLE = "ALIGN_PROCESSES"
_LAUNCH = re.compile(r"(^|[/.-])launch(\.py)?$")


def check_world_size() -> None:
    """Join the run's processes, and count them.

    Raises:
        WorldSizeError: there are more or fewer than were requested.
    """
    requested, found = requested_processes(), processes.connect()
    if requested is None or requested == found:
        return
    raise WorldSizeError(
        f"{requested} processes were requested, but {found} started. On CPUs `accelerate launch --cpu --num_processes "
        f"{requested}` starts only one; use `align launch STAGE --recipe FILE --nproc {requested}`, or type\n"
        f"  ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes {requested} -m align run …"
    )


def check_fsdp() -> None:
    """Refuse FSDP configurations that would give wrong results.

    Models that no optimizer trains (the reference, the reward model, the engine's model) are used as they are loaded,
    so every process must load their weights.

    Raises:
        InputError: only the first rank would load weights, which is accelerate's default for FSDP, or FSDP's version
            is not 2.
    """
    if not processes.is_set("ACCELERATE_USE_FSDP"):
        return
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise InputError(
            "fsdp_config.fsdp_version: is not 2 in accelerate's configuration, and FSDP's first version rounds results "
            "that losses need in full precision; write `fsdp_version: 2` there, as in recipes/accelerate/fsdp2.yaml"
        )
    if processes.is_set("FSDP_CPU_RAM_EFFICIENT_LOADING"):
        raise InputError(
            "fsdp_config.fsdp_cpu_ram_efficient_loading: is true in accelerate's configuration, which is its default; "
            "models would be empty in all processes but the first. Write `fsdp_cpu_ram_efficient_loading: false` "
            "there, as in recipes/accelerate/fsdp2.yaml"
        )


def requested_processes() -> int | None:
    """How many processes were requested: by `align launch`, or on the command line of `accelerate launch`."""
    if os.environ.get(PROCESSES_VARIABLE):
        return processes.number_in_environment(PROCESSES_VARIABLE, 1)
    import psutil

    try:
        command = psutil.Process(os.getppid()).cmdline()
    except psutil.Error:
        return None
    return requested_by_command(command)


def requested_by_command(command: Sequence[str]) -> int | None:
    """The number of processes that an `accelerate launch` command line requests; None if it requests none, or is
    another command."""
    launch = next((index for index, word in enumerate(command) if _LAUNCH.search(word)), None)
    if launch is None or "accelerate" not in " ".join(command[: launch + 1]):
        return None
    options = dict(_options(command[launch + 1 :]))
    if number := options.get("num_processes"):
        return int(number) if number.isdigit() else None
    return configured_processes(Path(options["config_file"])) if "config_file" in options else None


def check_config(config: Path) -> None:
    """Check that accelerate can read a configuration file, before anything is started with it.

    Raises:
        InputError: it cannot.
    """
    number = load_yaml(config)[0].get("num_processes", 1)
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise InputError(f"{config}: num_processes: must be a whole number above 0, got {number!r}")
    from accelerate.commands.config.config_args import load_config_from_file

    try:
        load_config_from_file(str(config))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"{config}: not a configuration file of accelerate ({first_line(error)}); use one of "
            "recipes/accelerate, or create one with `accelerate config --config_file FILE`"
        ) from error


def configured_processes(config: Path) -> int | None:
    """The number of processes in an accelerate configuration file."""
    number = load_yaml(config)[0].get("num_processes")
    return number if isinstance(number, int) else None


def _options(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The launcher's own options, which come before the program."""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word in {"-m", "--module"} or word.endswith(".py"):
            return
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            yield name.replace("-", "_"), value if equals else following
