"""Commands that run stages, and the number of processes that they request."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from align.errors import AlignError, InputError, WorldSizeError
from align.pipeline.failure_note import (
    FAILURE_VARIABLE,
    LAUNCHER_VARIABLE,
    another_failed_first,
    note_failure,
    read_failure,
)
from align.pipeline.launch import Launch, launch_stage, run_command, run_recipe, stage_command
from align.pipeline.recipe import Recipe, load_recipe, recipe_model
from align.pipeline.runner import run_stage
from align.pipeline.world_size import PROCESSES_VARIABLE, check_world_size, requested_by_command, requested_processes
from tests.fakes import FAKES, add_fake_stages, remove_fake_stages

CONFIG = "num_processes: 8\ndistributed_type: MULTI_GPU\n"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(FAKES))
    repository = FAKES.parent.parent
    monkeypatch.setenv("PYTHONPATH", f"{FAKES}:{repository}")
    add_fake_stages()
    recipe_model.cache_clear()
    Path("recipe.yaml").write_text("letters: {}\ncapitals: {}\n")
    yield tmp_path
    remove_fake_stages()
    recipe_model.cache_clear()


def recipe(*overrides: str) -> Recipe:
    return load_recipe("recipe.yaml", overrides)


def test_one_process_is_plain_python_unless_accelerate_is_asked_for() -> None:
    command = stage_command(recipe("seed=1", "letters.text=a b"), "letters", Launch())
    words = "-m align run letters --recipe recipe.yaml --set seed=1 --set".split()
    assert list(command.words[1:]) == [*words, "letters.text=a b"]
    assert command.environment == {}


def test_the_launch_verb_runs_one_process_by_accelerate_with_every_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(6))
    monkeypatch.setattr("psutil.cpu_count", lambda logical: 4)
    text = str(stage_command(recipe(), "letters", Launch(by_accelerate=True)))
    assert text.startswith("OMP_NUM_THREADS=4 "), "without it accelerate takes one thread"
    assert "accelerate launch --num_processes 1 " in text
    assert text.endswith("-m align run letters --recipe recipe.yaml")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    text = str(stage_command(recipe(), "letters", Launch(by_accelerate=True)))
    assert "accelerate launch --cpu --num_processes 1 " in text, "without it accelerate sets the variable to False"


def test_several_processes_on_cpus_take_the_command_that_really_starts_them() -> None:
    command = stage_command(recipe(), "letters", Launch(2))
    text = str(command)
    assert "ACCELERATE_USE_CPU=true" in text
    assert "accelerate launch --multi_gpu --num_processes 2 " in text
    assert "--cpu" not in text, "that starts one process, whatever number is asked for"
    assert text.endswith("-m align run letters --recipe recipe.yaml")


def test_a_configuration_file_is_passed_on_and_sets_the_number_of_processes() -> None:
    Path("ddp.yaml").write_text(CONFIG)
    assert Launch(None, Path("ddp.yaml")).processes == 8
    assert Launch(4, Path("ddp.yaml")).processes == 4
    words = stage_command(recipe(), "letters", Launch(4, Path("ddp.yaml"))).words
    assert words[1:6] == ("launch", "--config_file", "ddp.yaml", "--num_processes", "4")
    assert "--num_processes" not in stage_command(recipe(), "letters", Launch(None, Path("ddp.yaml"))).words


@pytest.mark.parametrize(
    ("command", "requested"),
    [
        ("python accelerate launch --cpu --num_processes 2 -m align run sft", 2),
        ("python /usr/bin/accelerate launch --cpu --num_processes=3 -m align run sft", 3),
        ("python /usr/bin/accelerate-launch --num-processes 4 -m align run sft", 4),
        ("python -m accelerate.commands.launch --num_processes 2 -m align run sft", 2),
        ("python /site-packages/accelerate/commands/launch.py --num_processes 2 -m align run sft", 2),
        ("python accelerate launch --config_file ddp.yaml -m align run sft", 8),
        ("python accelerate launch --cpu -m align run sft", None),
        ("python accelerate launch -m align run sft --num_processes 2", None),
        ("python accelerate launch train.py --num_processes 2", None),
        ("python -m align launch sft --nproc 2 --num_processes 7", None),
        ("bash", None),
        ("", None),
    ],
)
def test_the_number_is_read_off_the_launchers_own_options(command: str, requested: int | None) -> None:
    Path("ddp.yaml").write_text(CONFIG)
    assert requested_by_command(command.split()) == requested


def test_a_run_with_another_number_of_processes_than_requested_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PROCESSES_VARIABLE, "2")
    with pytest.raises(WorldSizeError, match="2 processes were requested, but 1 started"):
        run_stage(recipe(), "letters")
    assert not Path("runs").exists()


def test_a_run_whose_models_would_be_empty_in_all_processes_but_one_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InputError, match="fsdp_version: is not 2"):
        run_stage(recipe(), "letters")
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    with pytest.raises(InputError, match="fsdp_cpu_ram_efficient_loading: is true"):
        run_stage(recipe(), "letters")


def test_a_run_without_a_requested_number_of_processes_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PROCESSES_VARIABLE, raising=False)
    assert requested_processes() is None
    check_world_size()


def test_a_recipe_runs_each_stage_in_a_separate_process(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_recipe(recipe(), Launch()) == 0
    shown = capfd.readouterr().out
    assert "-m align run letters --recipe recipe.yaml\nletters: done in" in shown
    assert Path("runs/recipe/shared/capitals/capitals.txt").read_text() == "ABC 0"
    assert run_recipe(recipe(), Launch()) == 0
    assert capfd.readouterr().out == (
        "letters: up to date (runs/recipe/shared/letters)\ncapitals: up to date (runs/recipe/shared/capitals)\n"
    )


def test_each_stage_says_its_position_and_what_follows(capfd: pytest.CaptureFixture[str]) -> None:
    run_recipe(recipe(), Launch())
    shown = capfd.readouterr().out
    assert "stage 1 of 2: letters (then: capitals)\n$ " in shown
    assert "stage 2 of 2: capitals\n$ " in shown
    run_recipe(recipe("capitals.ending=s"), Launch())
    shown = capfd.readouterr().out
    assert "stage 1 of 2" not in shown and "stage 2 of 2: capitals\n$ " in shown


def test_a_recipe_stops_at_the_first_stage_that_fails(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_recipe(recipe("letters.fail=input"), Launch()) == 2
    shown = capfd.readouterr()
    assert shown.err == "letters.txt, line 3: not a letter; mend it\n"
    assert "capitals: " not in shown.out


def test_a_child_ends_even_if_its_errors_cannot_be_forwarded(tmp_path: Path) -> None:
    program = "import sys; sys.stderr.write('x' * 300_000)"
    launched = (
        "from pathlib import Path; from align.pipeline.launch import run_command; import sys; "
        f"sys.exit(run_command([sys.executable, '-c', {program!r}], {{}}, Path({str(tmp_path / 'note')!r})))"
    )
    read, write = os.pipe()
    os.close(read)
    assert subprocess.run([sys.executable, "-c", launched], stderr=write, timeout=60, check=False).returncode == 0
    os.close(write)


def test_a_failure_that_is_not_the_users_ends_with_one() -> None:
    assert launch_stage(recipe("letters.fail=not_finite"), "letters", Launch()) == 1


def test_a_stage_that_is_up_to_date_starts_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    run_stage(recipe(), "letters")
    monkeypatch.setattr("align.pipeline.launch.run_command", lambda *_: pytest.fail("started a process"))
    assert launch_stage(recipe(), "letters", Launch(8)) == 0


def test_exit_codes_and_signals_are_passed_on() -> None:
    assert run_command([sys.executable, "-c", "raise SystemExit(7)"], {}) == 7
    assert run_command([sys.executable, "-c", "import os; os.kill(os.getpid(), 15)"], {}) == 143


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of its parent's death")
def test_a_stage_does_not_outlive_the_process_that_launched_it() -> None:
    program = "import sys; from align.pipeline.launch import run_command; run_command([sys.executable, '-c', %r], {})"
    child = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    parent = subprocess.Popen([sys.executable, "-c", program % child], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    assert parent.stdout.readline().strip().isdigit()
    parent.kill()
    parent.wait()
    # The pipe closes once the last process that holds it is gone; the child's own end is a minute away.
    start = time.monotonic()
    assert parent.stdout.read() == ""
    assert time.monotonic() - start < 30


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of its parent's death")
@pytest.mark.parametrize("variables", [{"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "2"}, {PROCESSES_VARIABLE: "1"}])
def test_a_rank_does_not_outlive_its_launcher(variables: dict[str, str]) -> None:
    rank = (
        "import os, time; from align import __main__; "
        "__main__.main = lambda: print(os.getpid(), flush=True) or time.sleep(60); __main__.end()"
    )
    launcher = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {rank!r}])"
    environment = {**os.environ, **variables}
    parent = subprocess.Popen([sys.executable, "-c", launcher], env=environment, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    assert parent.stdout.readline().strip().isdigit()
    parent.kill()
    parent.wait()
    start = time.monotonic()
    assert parent.stdout.read() == "", "the pipe closes once the rank is gone"
    assert time.monotonic() - start < 30


def test_the_first_failure_is_noted_and_those_that_follow_from_it_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    note = tmp_path / "failure.json"
    assert not note_failure(InputError("nobody asked"))
    monkeypatch.setenv(FAILURE_VARIABLE, str(note))
    assert not another_failed_first()
    assert note_failure(InputError("first"))
    assert note_failure(AlignError("second"))
    assert not another_failed_first()
    monkeypatch.setattr("os.getpid", lambda: -1)
    assert another_failed_first()
    failure = read_failure(note)
    assert failure is not None
    assert (str(failure), failure.exit_code) == ("first", 2)


def test_under_accelerate_launch_the_first_to_fail_prints_its_error_and_writes_it_for_torchs_launcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(FAILURE_VARIABLE, raising=False)
    files = [tmp_path / f"attempt_0/{rank}/error.json" for rank in (0, 1)]
    for file in files:
        file.parent.mkdir(parents=True)
    monkeypatch.setenv(LAUNCHER_VARIABLE, str(files[1]))
    assert not note_failure(InputError("recipe.yaml: 1 problem\n  line 3")), "this process prints it"
    monkeypatch.setenv(LAUNCHER_VARIABLE, str(files[0]))
    monkeypatch.setattr("os.getpid", lambda: -1)
    assert note_failure(InputError("the same")) and another_failed_first()
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    failures = {rank: ProcessFailure(rank, 1, 2, str(file)) for rank, file in enumerate(files) if file.exists()}
    assert list(failures) == [1]
    assert "traceback : recipe.yaml: 1 problem\n    line 3\n====" in str(ChildFailedError("align", failures))


def test_a_failure_that_cannot_be_noted_is_printed_by_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FAILURE_VARIABLE, "/nowhere/failure.json")
    assert not note_failure(InputError("printed"))
    assert read_failure(Path("/nowhere/failure.json")) is None


def test_an_interruption_of_the_parent_alone_ends_the_child(tmp_path: Path) -> None:
    """As a supervisor sends it; a terminal would have interrupted the child too."""
    child = f"import pathlib, time; pathlib.Path({str(tmp_path / 'begun')!r}).touch(); time.sleep(60)"
    # A shell that starts these tests in the background has them ignore SIGINT.
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    call = f"sys.exit(run_command([sys.executable, '-c', {child!r}], {{}}))"
    program = f"{heard}; import sys; from align.pipeline.launch import run_command; {call}"
    parent = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL)
    while not (tmp_path / "begun").exists():
        time.sleep(0.05)
    parent.send_signal(signal.SIGINT)
    assert parent.wait(30) == 130
