"""Runs one stage of a recipe in each of its processes, and publishes the result.

A result that is up to date is kept. Otherwise the stage works in a partial folder, from which it resumes after a kill.
The first rank then publishes this folder as a whole, with a manifest that says what the outputs were made from.
"""

import fcntl
import os
import shlex
import shutil
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import date
from pathlib import Path

from align.data.chat import fix_date
from align.errors import InputError
from align.pipeline.plan import Plan, Step, make_plan
from align.pipeline.recipe import Recipe
from align.pipeline.reuse import reuse
from align.pipeline.world_size import check_fsdp, check_world_size
from align.run import processes
from align.run.artefacts import (
    MANIFEST,
    PARTIAL,
    Manifest,
    create_folder,
    output_digests,
    partial_directory,
    publish,
    read_manifest,
    write_json,
)
from align.run.disk_faults import explained_disk_faults
from align.run.reproducibility import environment, make_deterministic
from align.run.stage import Context, Outcome
from align.run.tracking import TIMINGS
from align.stages import all_stages

DATE = "date.txt"
"""The day on which a run began, in its folder. Its later stages, and those resumed later, have the same prompts."""


def run_stage(recipe: Recipe, stage: str, force: bool = False) -> bool:
    """Run a stage unless its result is up to date; returns whether it ran. Every process of the run calls this.

    Args:
        force: replace a finished model that was trained differently.

    Raises:
        InputError: the recipe lacks the stage, its inputs are not up to date, the output cannot be written,
            accelerate's FSDP configuration is refused, or a finished model would be replaced without `force`.
        WorldSizeError: there are more or fewer processes than were requested.
        AlignError: raised by the stage.
    """
    _prepare_environment()
    if recipe.deterministic:
        make_deterministic()
    check_world_size()
    check_fsdp()
    step = find_step(recipe, make_plan(recipe), stage)
    if is_up_to_date(step):
        return False
    _require_inputs(recipe, step)
    if not force:
        require_no_replacement([step])
    if is_reused(step):
        return False
    run = step.directory.parent
    with explained_disk_faults(run, run / PARTIAL), _stage_lock(run, stage):
        partial = _partial_folder(run, step)
        finished = read_manifest(partial)
        if finished is None or finished.fingerprint != step.fingerprint:
            try:
                _run_and_describe(recipe, step, partial)
            finally:
                if processes.is_first():
                    _remove_if_empty(partial)
        if processes.is_first():
            _publish(partial, step)
    processes.barrier()
    return True


def _prepare_environment() -> None:
    """Set what the libraries read when they are imported."""
    if processes.world_size() == 1:
        # With several GPUs visible, a trainer in a single process would split its batches over all of them.
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    if not processes.is_first():
        os.environ.update(HF_HUB_DISABLE_PROGRESS_BARS="1", TRANSFORMERS_VERBOSITY="error")
    # trl and peft still read this renamed attribute, and the warning would interrupt progress bars again and again.
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
    """Whether there is nothing to do. If so, touches the manifest, by whose time make decides."""
    processes.barrier()
    if step.is_done and processes.is_first():
        # Results of another user can be read but not touched; make then starts the stage again, which does nothing.
        with suppress(OSError):
            os.utime(step.directory / MANIFEST)
        print(f"{step.stage}: up to date ({step.directory})", flush=True)
    return step.is_done


def require_no_replacement(steps: Iterable[Step]) -> None:
    """Check that no finished model would be replaced by one that is trained differently.

    Raises:
        InputError: names each model that would be, and how to keep or replace it.
    """
    found = [step for step in steps if step.replaces]
    if not found:
        return
    named = "".join(f"\n  {step.directory}: {step.why}" for step in found)
    raise InputError(
        f"{', '.join(step.stage for step in found)}: already trained, and this run would replace the result:{named}\n"
        "To keep it, give this run another name (`--set name=NAME`), which reuses every stage that is still right; "
        "to replace it, add --force"
    )


def is_reused(step: Step) -> bool:
    """Take over the result of another run that already has it, if there is one; returns whether there was."""
    source = step.reuses
    if source is None:
        return False
    if processes.is_first():
        run = step.directory.parent
        with explained_disk_faults(run, run / PARTIAL), _stage_lock(run, step.stage):
            reuse(source, step.directory)
        print(f"{step.stage}: reused from {source} ({step.directory})", flush=True)
    processes.barrier()
    return True


def _require_inputs(recipe: Recipe, step: Step) -> None:
    if not step.waits_for:
        return
    missing = ", ".join(f"`{name}`" for name in step.waits_for)
    command = shlex.join(["align", "run", str(recipe.path), *recipe.override_options])
    raise InputError(
        f"{step.stage}: reads the results of {missing}, which are missing or stale; "
        f"run `{command}`, which runs every stage that is not up to date, in order"
    )


@contextmanager
def _stage_lock(run: Path, stage: str) -> Iterator[None]:
    """Hold the stage's lock on the first rank, so that two runs never share a folder. A kill releases the lock."""
    if not processes.is_first():
        yield
        return
    create_folder(run / PARTIAL)
    with (run / PARTIAL / f"{stage}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{run}: another process is running {stage}; wait for it to end, or stop it, and try again"
            ) from None
        yield


def _partial_folder(run: Path, step: Step) -> Path:
    """The folder that all processes work in. The first rank creates it."""
    assert step.work_fingerprint is not None
    if processes.is_first():
        partial_directory(run, step.stage, step.work_fingerprint)
    processes.barrier()
    return run / PARTIAL / f"{step.stage}-{step.work_fingerprint}"


def _run_and_describe(recipe: Recipe, step: Step, partial: Path) -> None:
    """Run the stage. Once every process has finished, the first rank writes the manifest into the partial folder."""
    start = time.monotonic()
    fix_date(processes.decide_on_first_rank(lambda: run_date(recipe, step.directory.parent)))
    stage = all_stages()[step.stage]
    context = _context(recipe, step, partial)
    outcome = stage.run(context) if processes.is_first() or stage.uses_processes else Outcome()
    processes.barrier()
    if processes.is_first():
        manifest = _manifest(step, outcome, partial, stage.outputs, time.monotonic() - start)
        write_json(partial / MANIFEST, manifest.__dict__)


def run_date(recipe: Recipe, run: Path) -> date | None:
    """The day that chat templates print: the recipe's, or else the one on which the run began, kept in its folder.

    None for a recipe without a model.

    Raises:
        InputError: the kept day is damaged.
    """
    model = recipe.shared["model"]
    if model is None:
        return None
    if model.date:
        return date.fromisoformat(model.date)
    for folder in dict.fromkeys((run, *map(recipe.run_directory, recipe.settings))):
        if (kept := folder / DATE).is_file():
            try:
                return date.fromisoformat(kept.read_text(encoding="utf-8").strip())
            except ValueError:
                raise InputError(f"{kept}: not a day (YYYY-MM-DD); correct it, or set `model.date`") from None
    today = date.today()
    (run / DATE).write_text(f"{today.isoformat()}\n", encoding="utf-8")
    return today


def _remove_if_empty(folder: Path) -> None:
    """Remove the partial folder of a stage that failed before it wrote anything."""
    with suppress(OSError):
        folder.rmdir()


def _context(recipe: Recipe, step: Step, partial: Path) -> Context:
    run = step.directory.parent
    return Context(
        stage=step.stage,
        settings=recipe.settings[step.stage],
        shared=recipe.shared_blocks(step.stage),
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
    """Move the finished folder into place, without the files that only served to resume it."""
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
