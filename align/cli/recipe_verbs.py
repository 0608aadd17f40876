"""The verbs that work on a recipe: `run`, `launch`, `plan`, `report`, `settings`, and `make-rules` for the Makefile."""

import argparse
import shlex
import sys
from pathlib import Path

from align.cli.options import Verbs, add_recipe_options, add_verb, positive, recipe_of
from align.errors import InputError
from align.pipeline.launch import Launch, launch_stage, run_recipe
from align.pipeline.plan import make_plan
from align.pipeline.recipe import Recipe
from align.pipeline.world_size import check_config
from align.stages import all_stages

ALL = "all"
RUN_DESCRIPTION = """\
`align run RECIPE` runs every stage of the recipe whose result is missing or stale. `align run STAGE --recipe RECIPE`
runs one stage, in this process unless --nproc or --accelerate-config asks for others. To start the processes yourself,
use `accelerate launch -m align run STAGE --recipe RECIPE`."""


def add_recipe_verbs(verbs: Verbs) -> None:
    """Add the verbs, in the order in which the help lists them."""
    stages = ", ".join(all_stages())
    text = "run a whole recipe, or one stage; results that are up to date are kept"
    run = add_verb(verbs, "run", _run, text, RUN_DESCRIPTION)
    run.add_argument("target", metavar="RECIPE|STAGE", help=f"a recipe file, or one of the stages: {stages}")
    launch = add_verb(verbs, "launch", _launch, "build, print and run the `accelerate launch` command of a stage")
    launch.add_argument("target", metavar=f"STAGE|{ALL}", help=f"`{ALL}`, or one of the stages: {stages}")
    plan = add_verb(verbs, "plan", _plan, "show which stages are done or stale, why, and which comes next")
    report = add_verb(verbs, "report", _report, "show the results of `reward` and `evaluate`, and where the models are")
    add_verb(verbs, "settings", _settings, "print every key of a recipe with type, default and meaning, as Markdown")
    # Without a summary, the help does not list this verb: only the Makefile uses it.
    rules = verbs.add_parser("make-rules", description="Write the make rules of a recipe, for the Makefile to include.")
    rules.set_defaults(run=_make_rules)
    rules.add_argument("--output", metavar="FILE", type=Path, required=True, help="the file to write")
    for verb in (plan, report, rules):
        verb.add_argument("target", metavar="RECIPE", help="a recipe file")
    for verb in (run, launch, plan, report, rules):
        add_recipe_options(verb)
    for verb in (run, launch, rules):
        verb.add_argument("--nproc", metavar="N", type=positive, help="number of processes to run a stage in")
        example = "such as recipes/accelerate/fsdp2.yaml"
        verb.add_argument(
            "--accelerate-config", metavar="FILE", type=Path, help=f"accelerate's configuration, {example}"
        )
        verb.add_argument(
            "--force", action="store_true", help="replace finished models that were trained with other settings"
        )


def _launch_options(options: argparse.Namespace, by_accelerate: bool = False) -> Launch:
    if options.accelerate_config is not None:
        check_config(options.accelerate_config)
    return Launch(options.nproc, options.accelerate_config, by_accelerate, options.force)


def _run(options: argparse.Namespace) -> int:
    launch = _launch_options(options)
    if options.target not in all_stages():
        return _run_recipe(options, options.recipe if options.target == ALL else _recipe_argument(options), launch)
    recipe = recipe_of(options, options.recipe)
    if launch.uses_accelerate:
        return launch_stage(recipe, options.target, launch)
    from align.pipeline.runner import run_stage

    run_stage(recipe, options.target, options.force)
    return 0


def _recipe_argument(options: argparse.Namespace) -> str:
    """The first argument of `align run`, which must be a recipe file because it is not a stage."""
    target = str(options.target)
    if Path(target).suffix in {".yaml", ".yml"}:
        if options.recipe is not None:
            raise InputError(f"align run {target}: the recipe is named twice; leave out --recipe {options.recipe}")
        return target
    raise InputError(
        f"align run {target}: no such stage; the stages are {', '.join(all_stages())}. "
        "To run a whole recipe: align run FILE.yaml"
    )


def _launch(options: argparse.Namespace) -> int:
    launch = _launch_options(options, by_accelerate=True)
    if options.target == ALL:
        return _run_recipe(options, options.recipe, launch)
    return launch_stage(recipe_of(options, options.recipe), options.target, launch)


def _run_recipe(options: argparse.Namespace, path: str | None, launch: Launch) -> int:
    recipe = recipe_of(options, path)
    evaluated_before = "evaluate" not in recipe.settings or make_plan(recipe)["evaluate"].is_done
    code = run_recipe(recipe, launch)
    # `evaluate` prints the results itself when it runs.
    if code == 0 and evaluated_before:
        _print_results(recipe)
    return code


def _plan(options: argparse.Namespace) -> None:
    from rich.console import Console

    from align.cli.plan import print_plan

    print_plan(recipe_of(options, options.target), Console())


def _report(options: argparse.Namespace) -> None:
    recipe = recipe_of(options, options.target)
    plan = make_plan(recipe)
    for stage in ("reward", "evaluate"):
        if stage in plan and not plan[stage].is_done and plan[stage].state != "missing":
            command = shlex.join(["align", "run", str(recipe.path), *recipe.override_options])
            why = plan[stage].why
            print(f"{stage}: the figures below are out of date ({why}); update them with `{command}`", file=sys.stderr)
    _print_results(recipe)


def _print_results(recipe: Recipe) -> None:
    """Print how good judge and reward model are, then the evaluation report; without one, every stage's folder."""
    if "compare" in recipe.settings:
        from align.feedback.calibration import print_published_calibration

        print_published_calibration(recipe.directory("compare"))
    if "reward" in recipe.settings:
        from align.training.held_out import print_published_held_out

        print_published_held_out(recipe.directory("reward"))
    if "evaluate" in recipe.settings:
        from align.evaluation.report import print_published_report

        print_published_report(recipe.directory("evaluate"))
        return
    for stage in recipe.settings:
        print(f"{stage:>8}  {recipe.directory(stage)}")


def _settings(_: argparse.Namespace) -> None:
    from align.cli.settings import settings_page

    print(settings_page(), end="")


def _make_rules(options: argparse.Namespace) -> None:
    from align.cli.make_rules import write_rules

    _launch_options(options)  # reports a bad accelerate configuration even if make finds that no stage has to run
    write_rules(recipe_of(options, options.target), options.output)
