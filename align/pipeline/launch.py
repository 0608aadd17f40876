"""Builds, prints and runs the command that runs a stage in one or more processes, as a user could type it."""

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
from align.pipeline.failure_note import FAILURE_VARIABLE, read_failure
from align.pipeline.plan import Plan, make_plan
from align.pipeline.recipe import Recipe
from align.pipeline.runner import find_step, is_reused, is_up_to_date, require_no_replacement
from align.pipeline.world_size import PROCESSES_VARIABLE, configured_processes
from align.run import processes
from align.stages import all_stages

GRACE_SECONDS = 2.0
"""How long to wait for a child to react by itself to an interruption, or to the failure of its sibling."""
INTERRUPTED = 128 + signal.SIGINT


@dataclass(frozen=True)
class Launch:
    """The number of processes to run a stage in, and accelerate's configuration file if there is one.

    accelerate always starts several processes; with `by_accelerate` it starts a single one too. `force` replaces
    finished models that were trained differently.
    """

    nproc: int | None = None
    config: Path | None = None
    by_accelerate: bool = False
    force: bool = False

    @property
    def processes(self) -> int:
        """The number of processes: `nproc` if given, otherwise that of the configuration file, otherwise 1."""
        if self.nproc is None and self.config is not None:
            return configured_processes(self.config) or 1
        return self.nproc or 1

    @property
    def uses_accelerate(self) -> bool:
        """Whether `accelerate launch` starts the stage."""
        return self.by_accelerate or self.config is not None or self.processes > 1


@dataclass(frozen=True)
class Command:
    """A command line, and the environment variables to set for it in addition to the present ones."""

    words: tuple[str, ...]
    environment: Mapping[str, str]

    def __str__(self) -> str:
        assignments = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*assignments, shlex.join(self.words)])


def run_recipe(recipe: Recipe, launch: Launch) -> int:
    """Run every stage of a recipe that is not up to date, each in separate processes; returns the exit code.

    Raises:
        InputError: a finished model would be replaced, and the launch does not force that. Nothing has run then.
    """
    if not launch.force:
        require_no_replacement(make_plan(recipe).values())
    codes = (launch_stage(recipe, stage, launch, show_position=True) for stage in recipe.settings)
    return next((code for code in codes if code), 0)


def launch_stage(recipe: Recipe, stage: str, launch: Launch, show_position: bool = False) -> int:
    """Run a stage in separate processes, unless it is up to date; returns the exit code.

    Args:
        show_position: first print which of the recipe's stages this is, and which remain after it.

    Raises:
        InputError: the recipe has no such stage.
        AlignError: the error of a process that accelerate started.
        KeyboardInterrupt: the processes that accelerate started were interrupted.
    """
    plan = make_plan(recipe)
    step = find_step(recipe, plan, stage)
    if is_up_to_date(step):
        return 0
    if not launch.force:
        require_no_replacement([step])
    if is_reused(step):
        return 0
    if show_position:
        print(f"\n{position_of(stage, plan)}", flush=True)
    if not all_stages()[stage].uses_processes:
        launch = Launch(by_accelerate=launch.by_accelerate, force=launch.force)
    command = stage_command(recipe, stage, launch)
    print(f"$ {command}", flush=True)
    with tempfile.TemporaryDirectory(prefix="align-") as folder:
        note = Path(folder) / "failure.json" if launch.uses_accelerate else None
        environment = {**command.environment, PROCESSES_VARIABLE: str(launch.processes)}
        code = run_command(command.words, environment | ({FAILURE_VARIABLE: str(note)} if note else {}), note)
        if code and note and (failure := read_failure(note)):
            raise failure
        if code == INTERRUPTED and note:
            raise KeyboardInterrupt
    return code


def position_of(stage: str, plan: Plan) -> str:
    """Which stage of the recipe this is, and which of those after it are not done yet."""
    stages = list(plan)
    number = stages.index(stage) + 1
    remaining = [name for name in stages[number:] if not plan[name].is_done]
    return f"stage {number} of {len(stages)}: {stage}" + (f" (then: {', '.join(remaining)})" if remaining else "")


def stage_command(recipe: Recipe, stage: str, launch: Launch) -> Command:
    """The command that runs a stage: by `accelerate launch`, or by Python itself if one process is enough."""
    program = ["-m", "align", "run", stage, "--recipe", str(recipe.path), *recipe.override_options]
    program += ["--force"] if launch.force else []
    if launch.config is not None:
        number = ["--num_processes", str(launch.nproc)] if launch.nproc else []
        return Command((_accelerate(), "launch", "--config_file", str(launch.config), *number, *program), {})
    if not launch.uses_accelerate:
        return Command((_short_path(Path(sys.executable)), *program), {})
    # Port 0 means any free port. The others are accelerate's defaults, about which it warns unless they are given.
    defaults = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    process_count = launch.processes
    kind = ["--multi_gpu"] if process_count > 1 else ["--cpu"] if processes.is_forced_onto_cpu() else []
    words = (_accelerate(), "launch", *kind, "--num_processes", str(process_count), *defaults, *program)
    return Command(words, _environment(process_count))


def run_command(words: Sequence[str], environment: Mapping[str, str], failure: Path | None = None) -> int:
    """Run a command to its end, or until this process dies. Returns its exit code, or 128 + n if signal n ended it.

    After an interruption it returns 130, whatever the child's exit code, so that no further stage starts.

    Args:
        failure: the file of the failure note. Once it exists, or after an interruption, the command's standard error is
            no longer passed on: launchers print pages about a failed process, and the caller prints the noted error.
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
    forwarding = threading.Thread(target=_forward_stderr, args=(child.stderr, failure, interrupted), daemon=True)
    forwarding.start()
    try:
        code = child.wait()
    except KeyboardInterrupt:
        interrupted.set()
        _interrupt(child)
        return INTERRUPTED
    forwarding.join(GRACE_SECONDS)
    return code if code >= 0 else 128 - code


def _forward_stderr(stderr: IO[bytes] | None, failure: Path | None, interrupted: threading.Event) -> None:
    if stderr is None or failure is None:
        return
    is_open = True
    # The child is read to its end even if nothing more can be forwarded: it would block on a full pipe.
    while part := os.read(stderr.fileno(), 1 << 16):
        if is_open and (not (failure.exists() or interrupted.is_set()) or os.environ.get("ALIGN_DEBUG")):
            is_open = _write_stderr(part)


def _write_stderr(part: bytes) -> bool:
    """Write to standard error; returns False if it is closed or full."""
    try:
        while part:
            part = part[os.write(2, part) :]
    except OSError:
        return False
    return True


def _terminal_size() -> dict[str, str]:
    """The terminal's size, for the child's progress bars, which see only a pipe when standard error is forwarded."""
    if not os.isatty(2):
        return {}
    size = os.get_terminal_size(2)
    return {"COLUMNS": str(size.columns), "LINES": str(size.lines)}


def _interrupt(child: "subprocess.Popen[bytes]") -> None:
    """Wait for an interrupted child to end. A terminal interrupts it too; if nothing else did, this function does."""
    signalled = False
    while True:
        try:
            child.wait(None if signalled else GRACE_SECONDS)
            return
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGINT)
            signalled = True
        except KeyboardInterrupt:
            continue


def die_with_parent() -> None:
    """Have the system end this process when its parent dies, whatever the cause (on Linux only)."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


def die_with_launcher() -> None:
    """Have this process end when its launcher, if it has one, dies. Otherwise it would keep the stage's lock."""
    if not {"LOCAL_RANK", PROCESSES_VARIABLE} & os.environ.keys():
        return
    launcher = os.getppid()
    die_with_parent()
    if os.getppid() != launcher:
        # The launcher died before the request above took effect.
        os._exit(128 + signal.SIGTERM)


def _environment(process_count: int) -> dict[str, str]:
    """The variables that accelerate needs. Without OMP_NUM_THREADS it would give a process on a CPU one thread."""
    if process_count == 1:
        return {"OMP_NUM_THREADS": _threads(process_count)}
    return {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": _threads(process_count)} if processes.on_cpu() else {}


def _threads(process_count: int) -> str:
    """Threads for each of `process_count` processes: together as many as torch would start in a single process."""
    if given := os.environ.get("OMP_NUM_THREADS"):
        return given
    import psutil

    usable = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return str(max(1, min(usable, psutil.cpu_count(logical=False) or usable) // process_count))


def _accelerate() -> str:
    beside = Path(sys.executable).with_name("accelerate")
    found = beside if beside.exists() else shutil.which("accelerate")
    if found is None:
        raise InputError(
            "accelerate: no such program next to Python or on the PATH; install it with `pip install accelerate`"
        )
    return _short_path(Path(found))


def _short_path(program: Path) -> str:
    """The program's path, relative if it lies below the current directory."""
    return str(program.relative_to(Path.cwd())) if program.is_relative_to(Path.cwd()) else str(program)
