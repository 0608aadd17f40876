"""`align make-rules`: writes the make rules of a recipe's stages, for the Makefile to include.

A stage's target is its manifest. It depends on the manifests of the stages that it reads, and on its slice of the
recipe. The slice is a file that is only written when its content changes, so make reruns only the stages that a change
affects.
"""

import os
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from align.errors import InputError
from align.pipeline.plan import Plan, Step, make_plan
from align.pipeline.recipe import Recipe
from align.run.artefacts import MANIFEST, write_json_if_changed
from align.stages import all_stages

HEADER = "# Written by `align make-rules` each time make runs."
SECOND = 10**9
"""In nanoseconds. The coarsest file systems store times to the second."""


def write_rules(recipe: Recipe, target: Path) -> None:
    """Write the slices and the rules; a file whose content would not change is left alone.

    Raises:
        InputError: a file cannot be written.
    """
    plan = make_plan(recipe)
    text = "\n".join([HEADER, *_rules(recipe, plan)]) + "\n"
    try:
        for step in plan.values():
            _write_slice(step)
        if not target.exists() or target.read_text(encoding="utf-8") != text:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"{error.filename}: cannot be written ({error.strerror}); choose another place with `output:` in the "
            "recipe or SET=output=DIR"
        ) from None


def _write_slice(step: Step) -> None:
    """Write a slice if it changed, and set its time so that make reaches the same conclusion as the plan.

    The slice is made older than a result that is up to date, which `align run` may have made without writing slices.
    It is made newer than a result that is stale for a reason that file times do not show.
    """
    path = _slice_path(step)
    changed = write_json_if_changed(path, step.slice)
    if step.is_done:
        made = (step.directory / MANIFEST).stat().st_mtime_ns
        if path.stat().st_mtime_ns >= made:
            os.utime(path, ns=(made - SECOND, made - SECOND))
    elif not changed and not step.waits_for:
        os.utime(path)


def _slice_path(step: Step) -> Path:
    return step.directory.parent / "slices" / f"{step.stage}.json"


def _rules(recipe: Recipe, plan: Plan) -> Iterator[str]:
    stages = sorted(all_stages())
    yield f".PHONY: {' '.join(stages)}"
    for stage in stages:
        yield from _stage_rules(recipe, plan, plan[stage]) if stage in plan else _absent_rules(recipe, stage)


def _stage_rules(recipe: Recipe, plan: Plan, step: Step) -> Iterator[str]:
    manifest = _escaped(step.directory / MANIFEST)
    inputs = [_escaped(plan[name].directory / MANIFEST) for name in recipe.inputs(step.stage)]
    yield f"{step.stage}: {manifest}"
    # An interrupted make deletes its current target unless it is marked precious.
    yield f".PRECIOUS: {manifest}"
    yield f"{manifest}: {' '.join([_escaped(_slice_path(step)), *inputs])}"
    yield f"\t@$(ALIGN) run {step.stage} {_options(recipe)} $(LAUNCH_OPTIONS)"


def _absent_rules(recipe: Recipe, stage: str) -> Iterator[str]:
    """The rule of a stage that the recipe does not have: `align run` reports that."""
    yield f"{stage}:"
    yield f"\t@$(ALIGN) run {stage} {_options(recipe)}"


def _options(recipe: Recipe) -> str:
    words: Sequence[str] = ["--recipe", str(recipe.path), *(w for o in recipe.overrides for w in ("--set", o))]
    return shlex.join(words).replace("$", "$$")


def _escaped(path: Path) -> str:
    """A path escaped for a list of targets in a makefile."""
    return re.sub(r"([ #:])", r"\\\1", str(path)).replace("$", "$$")
