"""Whether the run got the number of processes that was asked for.

`accelerate launch --cpu --num_processes 2` starts one process and says nothing; a run would then train on other batches
than its recipe says. So the number that was asked for is looked up, and compared with the processes that met.
"""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from align.errors import InputError, WorldSizeError, first_line
from align.run import processes
from align.settings.yaml_files import load_yaml

ASKED = "ALIGN_PROCESSES"
_LAUNCH = re.compile(r"(^|[/.-])launch(\.py)?$")


def check_world_size() -> None:
    """Join the run's processes, and count them.

    Raises:
        WorldSizeError: there are more or fewer than were asked for.
    """
    asked, found = asked_processes(), processes.connect()
    if asked is None or asked == found:
        return
    raise WorldSizeError(
        f"{asked} processes were asked for and {found} started. On CPUs `accelerate launch --cpu --num_processes "
        f"{asked}` starts one; use `align launch STAGE --recipe FILE --nproc {asked}`, or type\n"
        f"  ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes {asked} -m align run …"
    )


def check_loading() -> None:
    """Stop where accelerate's configuration would give weights to the first process alone.

    Models that no optimizer trains (references, reward models, the engine's) are used as they are loaded.

    Raises:
        InputError: it would; that is accelerate's default for FSDP. Or it shards by FSDP's first version.
    """
    if _is_on("ACCELERATE_USE_FSDP") and os.environ.get("FSDP_VERSION", "1") != "2":
        raise InputError(
            "fsdp_config.fsdp_version: is not 2 in accelerate's configuration, and FSDP's first version rounds results "
            "that losses need whole; write `fsdp_version: 2` there, as in recipes/accelerate/fsdp2.yaml"
        )
    if _is_on("ACCELERATE_USE_FSDP") and _is_on("FSDP_CPU_RAM_EFFICIENT_LOADING"):
        raise InputError(
            "fsdp_config.fsdp_cpu_ram_efficient_loading: is true in accelerate's configuration, as it is where nothing "
            "is said; models would be empty in all processes but the first. Write `fsdp_cpu_ram_efficient_loading: "
            "false` there, as in recipes/accelerate/fsdp2.yaml"
        )


def _is_on(name: str) -> bool:
    return os.environ.get(name, "").lower() in {"1", "true", "yes"}


def asked_processes() -> int | None:
    """How many processes were asked for: by `align launch`, or on the command line of `accelerate launch`."""
    if os.environ.get(ASKED):
        return processes.number_in_environment(ASKED, 1)
    import psutil

    try:
        command = psutil.Process(os.getppid()).cmdline()
    except psutil.Error:
        return None
    return asked_in(command)


def asked_in(command: Sequence[str]) -> int | None:
    """The number of processes that an `accelerate launch` command line asks for; None where it is none, or silent."""
    launch = next((index for index, word in enumerate(command) if _LAUNCH.search(word)), None)
    if launch is None or "accelerate" not in " ".join(command[: launch + 1]):
        return None
    options = dict(_options(command[launch + 1 :]))
    if number := options.get("num_processes"):
        return int(number) if number.isdigit() else None
    return configured_processes(Path(options["config_file"])) if "config_file" in options else None


def check_config(config: Path) -> None:
    """Have accelerate read a configuration file before anything is started with it.

    Raises:
        InputError: it is none.
    """
    number = load_yaml(config)[0].get("num_processes", 1)
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise InputError(f"{config}: num_processes: must be a whole number above 0, got {number!r}")
    from accelerate.commands.config.config_args import load_config_from_file

    try:
        load_config_from_file(str(config))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"{config}: no configuration file of accelerate ({first_line(error)}); take one of "
            "recipes/accelerate, or make one with `accelerate config --config_file FILE`"
        ) from error


def configured_processes(config: Path) -> int | None:
    """The number of processes in an accelerate configuration file."""
    number = load_yaml(config)[0].get("num_processes")
    return number if isinstance(number, int) else None


def _options(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The launcher's own options: those before the program."""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word in {"-m", "--module"} or word.endswith(".py"):
            return
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            yield name.replace("-", "_"), value if equals else following
