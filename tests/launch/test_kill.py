"""kill -9 at any moment, and the same command again: the results are those of an undisturbed run."""

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.launch.pipeline import Run


def lines(run: Path, pattern: str) -> int:
    """Rows in the files of this pattern."""
    return sum(path.read_bytes().count(b"\n") for path in run.glob(pattern))


def newest(run: Path, pattern: str) -> int:
    """The step of the newest checkpoint that is whole."""
    return max((int(path.parent.name.rpartition("-")[2]) for path in run.glob(pattern)), default=0)


PROGRESS: dict[str, tuple[Callable[[Path, str], int], str]] = {
    "sample": (lines, ".partial/sample-*/windows/*/samples.journal.*"),
    "revise": (lines, ".partial/revise-*/windows/*/steps.journal.*"),
    "compare": (lines, ".partial/compare-*/windows/*/completions.journal.*"),
    "sft": (newest, ".partial/sft-*/checkpoint/checkpoint-*/complete"),
    "reward": (newest, ".partial/reward-*/checkpoint/checkpoint-*/complete"),
}


def total(run: Run, stage: str) -> int:
    """What a stage's progress ends at; every prompt is completed three times, every sample takes two rounds."""
    counts = run.manifest(stage)["counts"]
    if stage == "sample":
        return int(counts["samples"])
    if stage == "revise":
        return 4 * int(counts["samples"])
    return int(counts["comparisons"] if stage == "compare" else counts["steps"])


@pytest.mark.parametrize("stage", PROGRESS)
def test_a_stage_killed_after_some_of_its_work_ends_with_the_same_bytes(
    finished: Run, tmp_path: Path, stage: str
) -> None:
    run = finished.copy(tmp_path / "copy", without=[stage])
    folder = run.stage(stage).parent
    measure, pattern = PROGRESS[stage]
    whole, draw = total(finished, stage), random.Random(stage)
    command = ("run", stage, "--recipe", "tiny.yaml")
    moment = max(1, round(draw.uniform(0.1, 0.7) * whole))
    assert run.kill_when(lambda: measure(folder, pattern) >= moment, *command), "ended before the kill"
    assert measure(folder, pattern) >= moment, "what was finished is kept"
    assert not run.stage(stage).exists()
    run.make(*command)

    assert run.manifest(stage)["outputs"] == finished.manifest(stage)["outputs"]
    assert run.manifest(stage)["counts"] == finished.manifest(stage)["counts"]
    assert {path.name for path in run.stage(stage).iterdir()} == {path.name for path in finished.stage(stage).iterdir()}
    assert not list((folder / ".partial").glob(f"{stage}-*"))


def after(delay: float, begun: Callable[[], bool]) -> Callable[[], bool]:
    """Whether this many seconds have passed since the beginning."""
    start: list[float] = []

    def is_over() -> bool:
        if not start and begun():
            start.append(time.monotonic())
        return bool(start) and time.monotonic() - start[0] >= delay

    return is_over


@pytest.mark.parametrize("stage", [*PROGRESS, "ppo"])
def test_a_stage_killed_by_the_clock_ends_with_the_same_bytes(finished: Run, tmp_path: Path, stage: str) -> None:
    run = finished.copy(tmp_path / "copy", without=[stage])
    folder, seconds = run.stage(stage).parent, finished.manifest(stage)["seconds"]
    draw, command = random.Random(f"clock {stage}"), ("run", stage, "--recipe", "tiny.yaml")

    def has_begun() -> bool:
        return any((folder / ".partial").glob(f"{stage}-*"))

    assert run.kill_when(after(draw.uniform(0, 0.5) * seconds, has_begun), *command), "ended before the kill"
    # Anywhere from Python's start to the end, or beyond it on a faster machine: what is published then stands.
    run.kill_when(after(draw.uniform(0, 2 + seconds), lambda: True), *command)
    run.make(*command)

    assert run.manifest(stage)["outputs"] == finished.manifest(stage)["outputs"]
    assert run.manifest(stage)["counts"] == finished.manifest(stage)["counts"]
