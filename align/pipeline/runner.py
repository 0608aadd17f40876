"""Runs one stage of a recipe in each of its processes, and publishes what it made.

A result that is up to date is left alone. Otherwise the stage works in a folder of its own, which a kill leaves for
the next try, and the first process publishes it whole: outputs, and a manifest that says what they came from.
"""

import fcntl
import os
import shlex
import shutil
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from align.errors import InputError
from align.pipeline.plan import Plan, Step, make_plan
from align.pipeline.recipe import Recipe
from align.pipeline.world_size import check_loading, check_world_size
from align.run import processes
from align.run.artefacts import (
    MANIFEST,
    PARTIAL,
    Manifest,
    output_digests,
    partial_directory,
    publish,
    read_manifest,
    write_json,
)
from align.run.disk_faults import FULL_DISK, disk_faults_told
from align.run.reproducibility import environment
from align.run.stage import Context, Outcome
from align.run.tracking import TIMINGS
from align.stages import all_stages


def run_stage(recipe: Recipe, stage: str) -> bool:
    """Run a stage unless its result is up to date; returns whether it ran. Called in every process of the run.

    Raises:
        InputError: the recipe lacks the stage, or the results that it reads; or the output cannot be written.
        WorldSizeError: there are more or fewer processes than were asked for.
        InputError: they would not all have the models' weights.
        AlignError: whatever the stage raises.
    """
    _settle_environment()
    check_world_size()
    check_loading()
    step = find_step(recipe, make_plan(recipe), stage)
    if is_up_to_date(step):
        return False
    _require_inputs(recipe, step)
    run = step.directory.parent
    with disk_faults_told(run, run / PARTIAL), _alone(run, stage):
        partial = _partial(run, step)
        finished = read_manifest(partial)
        if finished is None or finished.fingerprint != step.fingerprint:
            try:
                _work(recipe, step, partial)
            finally:
                if processes.is_first():
                    _remove_if_empty(partial)
        if processes.is_first():
            _publish(partial, step)
    processes.barrier()
    return True


def _settle_environment() -> None:
    """What the libraries must find before they are imported."""
    if processes.world_size() == 1:
        # A trainer alone on a machine with several GPUs would split its batches over them all.
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    if not processes.is_first():
        os.environ.update(HF_HUB_DISABLE_PROGRESS_BARS="1", TRANSFORMERS_VERBOSITY="error")
    # A renamed attribute that trl and peft still read, again and again in the midst of progress bars.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)


def find_step(recipe: Recipe, plan: Plan, stage: str) -> Step:
    """The plan's step of a stage.

    Raises:
        InputError: the recipe has no such stage.
    """
    if stage in plan:
        return plan[stage]
    remedy = f"add `{stage}: {{}}` to it" if stage in all_stages() else f"there are {', '.join(all_stages())}"
    raise InputError(f"{recipe.path}: no stage `{stage}` in this recipe; {remedy}")


def is_up_to_date(step: Step) -> bool:
    """Whether there is nothing to do. If so the manifest's time is renewed, so that make sees it too."""
    processes.barrier()
    if step.is_done and processes.is_first():
        # Somebody else's results may be read all the same; make then asks again.
        with suppress(OSError):
            os.utime(step.directory / MANIFEST)
        print(f"{step.stage}: up to date ({step.directory})", flush=True)
    return step.is_done


def _require_inputs(recipe: Recipe, step: Step) -> None:
    if not step.waits_for:
        return
    missing = ", ".join(f"`{name}`" for name in step.waits_for)
    command = shlex.join(["align", "run", str(recipe.path), *recipe.override_options])
    raise InputError(
        f"{step.stage}: reads the results of {missing}, not made yet or stale; "
        f"run `{command}`, which makes whatever is not up to date, in order"
    )


@contextmanager
def _alone(run: Path, stage: str) -> Iterator[None]:
    """Hold the stage's lock in the first process, so that two runs never work in one folder. A kill releases it."""
    if not processes.is_first():
        yield
        return
    _make_folder(run / PARTIAL)
    with (run / PARTIAL / f"{stage}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{run}: {stage} is being run by another process; wait for it, or end it, and try again"
            ) from None
        yield


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in FULL_DISK:
            raise
        raise InputError(
            f"{folder}: cannot be made ({error.strerror}); choose another place with `output:` in the recipe "
            "or --set output=DIR"
        ) from None


def _partial(run: Path, step: Step) -> Path:
    """The folder that the processes work in, made by the first."""
    assert step.work is not None
    if processes.is_first():
        partial_directory(run, step.stage, step.work)
    processes.barrier()
    return run / PARTIAL / f"{step.stage}-{step.work}"


def _work(recipe: Recipe, step: Step, partial: Path) -> None:
    """Run the stage; once every process has ended, the first writes the manifest into the partial folder."""
    start = time.monotonic()
    stage = all_stages()[step.stage]
    context = _context(recipe, step, partial)
    alone = not stage.uses_processes
    outcome = stage.run(context) if processes.is_first() or not alone else Outcome()
    processes.barrier()
    if processes.is_first():
        manifest = _manifest(step, outcome, partial, stage.outputs, time.monotonic() - start)
        write_json(partial / MANIFEST, manifest.__dict__)


def _remove_if_empty(folder: Path) -> None:
    """Leave nothing of a stage that was refused its input before it wrote anything."""
    with suppress(OSError):
        folder.rmdir()


def _context(recipe: Recipe, step: Step, partial: Path) -> Context:
    shared = recipe.shared_with(step.stage)
    run = step.directory.parent
    return Context(
        stage=step.stage,
        settings=recipe.settings[step.stage],
        shared=shared,
        inputs={name: recipe.directory(name) for name in recipe.inputs(step.stage)},
        output=partial,
        seed=recipe.seed,
        run_name=f"{run.parent.name}/{run.name}",
        tracking=recipe.tracking,
    )


def _manifest(step: Step, outcome: Outcome, partial: Path, outputs: tuple[str, ...], seconds: float) -> Manifest:
    assert step.fingerprint is not None
    return Manifest(
        stage=step.stage,
        fingerprint=step.fingerprint,
        settings=step.slice,
        inputs=dict(step.inputs),
        outputs=output_digests(partial, [name for name in outputs if (partial / name).exists()]),
        counts=dict(outcome.counts),
        figures=dict(outcome.figures),
        processes=processes.world_size() if all_stages()[step.stage].uses_processes else 1,
        seconds=round(seconds, 1),
        environment=environment(),
    )


def _publish(partial: Path, step: Step) -> None:
    """Move the finished folder into place, without what only served to make it."""
    manifest = read_manifest(partial)
    assert manifest is not None
    kept = {MANIFEST, TIMINGS, *(name.split("/")[0] for name in manifest.outputs)}
    for path in partial.iterdir():
        if path.name not in kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    publish(partial, step.directory, manifest)
    counted = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in manifest.counts.items())
    print(f"{step.stage}: done in {manifest.seconds:.0f} s ({step.directory})", flush=True)
    if counted:
        print(f"  {counted}", flush=True)
