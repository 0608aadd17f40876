"""The Makefile: a target brings up to date what it needs, and nothing else."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.fakes import FAKES

MAKEFILE = FAKES.parent.parent / "Makefile"
CONSTITUTION = "title: Small\nprinciples:\n  - {id: calm, text: Be calm.}\n"

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder in which make believes the environment to be installed."""
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (1, 1))
    (tmp_path / "installed").touch()
    (tmp_path / "recipe.yaml").write_text("letters: {}\ncapitals: {}\n")
    return tmp_path


def make(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(FAKES), os.environ["PYTHONPATH"]])
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    variables = {
        "ALIGN": f"{sys.executable} -m align",
        "INSTALLED": "installed",
        "STAGES": "letters capitals",
        "RECIPE": "recipe.yaml",
    }
    assignments = [f"{name}={value}" for name, value in variables.items()]
    return subprocess.run(
        ["make", "-f", str(MAKEFILE), *assignments, *words],
        cwd=folder,
        env={**environment, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )


def ran(folder: Path, *words: str) -> list[str]:
    """The stages that a make ran."""
    done = make(folder, *words)
    assert done.returncode == 0, done.stderr
    return [line.split(":")[0] for line in done.stdout.splitlines() if ": done in" in line]


def test_a_target_brings_its_inputs_up_to_date_first_and_runs_nothing_twice(folder: Path) -> None:
    assert ran(folder, "capitals") == ["letters", "capitals"]
    start = time.monotonic()
    assert ran(folder, "capitals", "letters") == []
    assert time.monotonic() - start < 2, "deciding that there is nothing to do"


def test_a_changed_setting_runs_what_depends_on_it(folder: Path) -> None:
    assert ran(folder, "letters", "capitals") == ["letters", "capitals"]
    assert ran(folder, "capitals", "SET=capitals.ending=s") == ["capitals"]
    assert ran(folder, "capitals", "SET=capitals.ending=s letters.text=xy") == ["letters", "capitals"]
    assert (folder / "runs/recipe/shared/capitals/capitals.txt").read_text() == "XYs 0"


def test_a_result_made_again_alike_runs_nothing_that_follows(folder: Path) -> None:
    assert ran(folder, "capitals") == ["letters", "capitals"]
    assert ran(folder, "capitals", "SET=letters.fail_in=1") == ["letters"]
    assert ran(folder, "capitals", "SET=letters.fail_in=1") == []


def test_a_missing_output_is_made_again(folder: Path) -> None:
    ran(folder, "capitals")
    (folder / "runs/recipe/shared/letters/letters.txt").unlink()
    assert ran(folder, "capitals") == ["letters"]
    assert ran(folder, "capitals") == []


def test_two_constitutions_share_what_depends_on_neither(folder: Path) -> None:
    for name, title in (("a", "Calm"), ("b", "Loud")):
        (folder / f"{name}.yaml").write_text(CONSTITUTION.replace("Small", title))
    assert ran(folder, "capitals", "CONSTITUTION=a.yaml") == ["letters", "capitals"]
    assert ran(folder, "capitals", "CONSTITUTION=b.yaml") == ["capitals"]
    assert ran(folder, "capitals", "CONSTITUTION=a.yaml") == []
    texts = sorted(path.read_text() for path in folder.glob("runs/recipe/*/capitals/capitals.txt"))
    assert texts == ["ABCCalm 0", "ABCLoud 0"]


def test_stages_run_in_order_whatever_the_number_of_jobs(folder: Path) -> None:
    done = make(folder, "-j4", "capitals", "letters")
    assert done.returncode == 0, done.stderr
    assert done.stdout.index("letters: done in") < done.stdout.index("capitals: done in")


def test_run_brings_the_whole_recipe_up_to_date(folder: Path) -> None:
    assert ran(folder, "run") == ["letters", "capitals"]
    again = make(folder, "run", "capitals")
    assert "letters: up to date (runs/recipe/shared/letters)" in again.stdout
    assert "capitals  runs/recipe/shared/capitals\n" in again.stdout, "where the results are"


def test_what_run_made_by_itself_is_up_to_date_for_every_target(folder: Path) -> None:
    path = os.pathsep.join([str(FAKES), os.environ["PYTHONPATH"]])
    command = [sys.executable, "-m", "align", "run", "recipe.yaml"]
    subprocess.run(command, cwd=folder, env={**os.environ, "PYTHONPATH": path}, check=True, capture_output=True)
    first = make(folder, "capitals")
    assert first.returncode == 0, first.stderr
    assert "up to date (" not in first.stdout, "no stage was started only to say so"


def test_an_old_make_is_refused(folder: Path) -> None:
    old = make(folder, "help", "MAKE_VERSION=3.81")
    assert old.returncode == 2
    assert "GNU make 4.2 or newer is needed, this is 3.81" in old.stderr


def test_a_failing_stage_ends_make_with_its_message_and_is_tried_again(folder: Path) -> None:
    failed = make(folder, "capitals", "SET=letters.fail=input")
    assert failed.returncode == 2
    assert "letters.txt, line 3: not a letter; mend it" in failed.stderr
    assert not list(folder.glob("runs/recipe/shared/capitals"))
    assert ran(folder, "capitals") == ["letters", "capitals"]


def test_a_faulty_recipe_ends_make_with_its_faults(folder: Path) -> None:
    (folder / "recipe.yaml").write_text("letters: {txt: a}\n")
    failed = make(folder, "letters")
    assert failed.returncode == 2
    assert "line 1  letters.txt: no such setting; did you mean `text`?" in failed.stderr
    assert "No such file" not in failed.stderr, "make's own, of the rules that it has not"


@pytest.mark.parametrize("number", ["0", "x"])
def test_a_number_of_processes_that_is_none_is_refused_with_nothing_to_do_too(folder: Path, number: str) -> None:
    assert ran(folder, "letters") == ["letters"]
    refused = make(folder, "letters", f"NPROC={number}")
    assert refused.returncode == 2
    assert f"--nproc: expected a whole number above 0, got {number}" in refused.stderr


def test_a_stage_that_the_recipe_lacks_is_named(folder: Path) -> None:
    (folder / "recipe.yaml").write_text("letters: {}\n")
    failed = make(folder, "capitals")
    assert failed.returncode == 2
    assert "no stage `capitals` in this recipe" in failed.stderr


def test_an_output_folder_with_a_space_in_its_name_works(folder: Path) -> None:
    (folder / "recipe.yaml").write_text("output: my runs\nletters: {}\ncapitals: {}\n")
    assert ran(folder, "capitals") == ["letters", "capitals"]
    assert ran(folder, "capitals") == []


def test_help_and_clean_need_no_recipe(folder: Path) -> None:
    for target in ("help", "clean"):
        assert make(folder, target, "RECIPE=gone.yaml").returncode == 0
    (folder / "runs/recipe").mkdir(parents=True)
    make(folder, "clean")
    assert (folder / "runs/recipe").is_dir(), "results stay"
    assert (folder / "installed").exists()


def test_help_names_every_target_and_stage() -> None:
    shown = subprocess.run(["make", "help"], cwd=MAKEFILE.parent, capture_output=True, text=True, check=True).stdout
    for word in "quickstart run plan chat test check clean sample revise sft compare reward ppo dpo evaluate".split():
        assert f" {word}" in shown
