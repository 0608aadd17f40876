"""Builds, prints and runs the command that runs a stage in one process or several: one that a person could type."""

import ctypes
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from align.errors import InputError
from align.pipeline.failure_note import FAILURE, read_failure
from align.pipeline.plan import Plan, make_plan
from align.pipeline.recipe import Recipe
from align.pipeline.runner import find_step, is_up_to_date
from align.pipeline.world_size import ASKED, configured_processes
from align.run import processes
from align.stages import all_stages

PATIENCE_SECONDS = 2.0
"""How long a child that was interrupted, or whose sibling failed, may take to show that it knows."""
INTERRUPTED = 128 + signal.SIGINT


@dataclass(frozen=True)
class Launch:
    """How many processes to run a stage in, and accelerate's configuration file where there is one.

    Several processes are always started by accelerate; `by_accelerate` asks for it with one too.
    """

    nproc: int | None = None
    config: Path | None = None
    by_accelerate: bool = False

    @property
    def processes(self) -> int:
        """How many processes that makes."""
        if self.nproc is None and self.config is not None:
            return configured_processes(self.config) or 1
        return self.nproc or 1

    @property
    def uses_accelerate(self) -> bool:
        """Whether the stage is started by `accelerate launch`."""
        return self.by_accelerate or self.config is not None or self.processes > 1


@dataclass(frozen=True)
class Command:
    """A command line, and the environment variables that it needs besides those there are."""

    words: tuple[str, ...]
    environment: Mapping[str, str]

    def __str__(self) -> str:
        assignments = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*assignments, shlex.join(self.words)])


def run_recipe(recipe: Recipe, launch: Launch) -> int:
    """Run every stage of a recipe that is not up to date, each in processes of its own; returns the exit code."""
    codes = (launch_stage(recipe, stage, launch, say_place=True) for stage in recipe.settings)
    return next((code for code in codes if code), 0)


def launch_stage(recipe: Recipe, stage: str, launch: Launch, say_place: bool = False) -> int:
    """Run a stage in processes of its own, unless it is up to date; returns the exit code.

    Args:
        say_place: print first which of the recipe's stages this is, and what is left after it.

    Raises:
        InputError: the recipe has no such stage.
        AlignError: what a process that accelerate started failed with.
        KeyboardInterrupt: the processes that accelerate started were interrupted.
    """
    plan = make_plan(recipe)
    if is_up_to_date(find_step(recipe, plan, stage)):
        return 0
    if say_place:
        print(f"\n{place_of(stage, plan)}", flush=True)
    if not all_stages()[stage].uses_processes:
        launch = Launch(by_accelerate=launch.by_accelerate)
    command = stage_command(recipe, stage, launch)
    print(f"$ {command}", flush=True)
    with tempfile.TemporaryDirectory(prefix="align-") as folder:
        note = Path(folder) / "failure.json" if launch.uses_accelerate else None
        noted = {FAILURE: str(note)} if note else {}
        code = run(command.words, {**command.environment, ASKED: str(launch.processes), **noted}, note)
        if code and note and (failure := read_failure(note)):
            raise failure
        if code == INTERRUPTED and note:
            raise KeyboardInterrupt
    return code


def place_of(stage: str, plan: Plan) -> str:
    """Which stage of the recipe this is, and which are still to be made after it."""
    stages = list(plan)
    number = stages.index(stage) + 1
    left = [name for name in stages[number:] if not plan[name].is_done]
    return f"stage {number} of {len(stages)}: {stage}" + (f" (left: {', '.join(left)})" if left else "")


def stage_command(recipe: Recipe, stage: str, launch: Launch) -> Command:
    """The command that runs a stage: `accelerate launch`, or Python itself where one process is all that is wanted."""
    program = ["-m", "align", "run", stage, "--recipe", str(recipe.path), *recipe.override_options]
    if launch.config is not None:
        number = ["--num_processes", str(launch.nproc)] if launch.nproc else []
        return Command((_accelerate(), "launch", "--config_file", str(launch.config), *number, *program), {})
    if not launch.uses_accelerate:
        return Command((_shown(Path(sys.executable)), *program), {})
    # Port 0 takes a free one; the rest are accelerate's defaults, which it complains about when they are not given.
    given = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    asked = launch.processes
    kind = ["--multi_gpu"] if asked > 1 else ["--cpu"] if processes.is_kept_off_gpus() else []
    words = (_accelerate(), "launch", *kind, "--num_processes", str(asked), *given, *program)
    return Command(words, _environment(asked))


def run(words: Sequence[str], environment: Mapping[str, str], failure: Path | None = None) -> int:
    """Run a command to its end, and end it should this process die; returns its exit code, 128 + n after signal n.

    Interrupted, it returns 130 whatever the child made of it, so that nothing follows.

    Args:
        failure: once this file is there, or after an interruption, what the command writes to standard error is not
            passed on: launchers print pages about a process that failed, and its own error is told by who reads the
            file.
    """
    if failure is not None:
        environment = {**environment, **_terminal_size()}
    child = subprocess.Popen(
        words,
        env={**os.environ, **environment},
        preexec_fn=die_with_parent,
        stderr=None if failure is None else subprocess.PIPE,
    )
    interrupted = threading.Event()
    passing = threading.Thread(target=_pass_on, args=(child.stderr, failure, interrupted), daemon=True)
    passing.start()
    try:
        code = child.wait()
    except KeyboardInterrupt:
        interrupted.set()
        _interrupt(child)
        return INTERRUPTED
    passing.join(PATIENCE_SECONDS)
    return code if code >= 0 else 128 - code


def _pass_on(errors: IO[bytes] | None, failure: Path | None, interrupted: threading.Event) -> None:
    if errors is None or failure is None:
        return
    heard = True
    while part := os.read(errors.fileno(), 1 << 16):
        if heard and (not (failure.exists() or interrupted.is_set()) or os.environ.get("ALIGN_DEBUG")):
            heard = _written(part)


def _written(part: bytes) -> bool:
    """Whether standard error took it. Where it is closed or full the child must still be read, or it would wait."""
    try:
        while part:
            part = part[os.write(2, part) :]
    except OSError:
        return False
    return True


def _terminal_size() -> dict[str, str]:
    """What progress bars go by when standard error is passed on to a terminal and is none itself."""
    if not os.isatty(2):
        return {}
    size = os.get_terminal_size(2)
    return {"COLUMNS": str(size.columns), "LINES": str(size.lines)}


def _interrupt(child: "subprocess.Popen[bytes]") -> None:
    """Wait for an interrupted child. A terminal tells it too; where nobody has, we do."""
    told = False
    while True:
        try:
            child.wait(None if told else PATIENCE_SECONDS)
            return
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGINT)
            told = True
        except KeyboardInterrupt:
            continue


def die_with_parent() -> None:
    """Have the system end this process when its parent dies, however that is (Linux alone has this)."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


def die_with_launcher() -> None:
    """Have this process end when its launcher dies, where it has one: it would hold the stage's lock."""
    if not {"LOCAL_RANK", ASKED} & os.environ.keys():
        return
    launcher = os.getppid()
    die_with_parent()
    if os.getppid() != launcher:
        # The launcher died before the system knew that it should tell.
        os._exit(128 + signal.SIGTERM)


def _environment(number: int) -> dict[str, str]:
    """What accelerate must find. Without OMP_NUM_THREADS it would have a process on a CPU work with one thread."""
    if number == 1:
        return {"OMP_NUM_THREADS": _threads(number)}
    return {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": _threads(number)} if processes.on_cpu() else {}


def _threads(number: int) -> str:
    """Threads of each of so many processes: together those that torch by itself would start in one."""
    if given := os.environ.get("OMP_NUM_THREADS"):
        return given
    import psutil

    usable = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return str(max(1, min(usable, psutil.cpu_count(logical=False) or usable) // number))


def _accelerate() -> str:
    beside = Path(sys.executable).with_name("accelerate")
    found = beside if beside.exists() else shutil.which("accelerate")
    if found is None:
        raise InputError(
            "accelerate: no such program beside Python or on the PATH; install it with `pip install accelerate`"
        )
    return _shown(Path(found))


def _shown(program: Path) -> str:
    """The program's path, short where it lies under the current directory."""
    return str(program.relative_to(Path.cwd())) if program.is_relative_to(Path.cwd()) else str(program)
