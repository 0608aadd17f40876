"""The command line: `align VERB …`, or `python -m align VERB …`. Imports nothing heavy before a verb needs it."""

import argparse
import os
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from align.cli.constitution_verbs import add_constitution
from align.cli.judging_verbs import add_engine, add_judge, add_relabel
from align.cli.options import Verbs, add_recipe_options, positive, recipe_of
from align.cli.results_verbs import add_results
from align.errors import AlignError, InputError
from align.pipeline.failure_note import another_failed_first, note_failure
from align.pipeline.launch import GRACE_SECONDS, INTERRUPTED, Launch, die_with_launcher, launch_stage, run_recipe
from align.pipeline.plan import make_plan
from align.pipeline.recipe import Recipe
from align.pipeline.world_size import check_config
from align.run import processes
from align.stages import all_stages

ALL = "all"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb; returns the exit code: 0 done, 2 bad input, 1 a failure of ours, 130 interrupted."""
    try:
        options = _parser().parse_args(arguments)
        return int(options.run(options) or 0)
    except AlignError as error:
        if os.environ.get("ALIGN_DEBUG"):
            traceback.print_exc()
        return _tell(error)
    except KeyboardInterrupt:
        interruption = AlignError("interrupted; the same command goes on from here")
        interruption.exit_code = INTERRUPTED
        return _tell(interruption)


def _tell(error: AlignError) -> int:
    """Print an error, unless another process tells it; its exit code."""
    if not note_failure(error):
        rank = f"process {processes.rank()}: " if _is_one_of_several() else ""
        print(f"{rank}{error}", file=sys.stderr)
    return error.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="align", description="RLHF and Constitutional AI, from a recipe to a model.")
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    _add_run(verbs)
    _add_recipe_verbs(verbs)
    add_constitution(verbs)
    add_engine(verbs)
    add_judge(verbs)
    add_relabel(verbs)
    add_results(verbs)
    return parser


def _add_run(verbs: Verbs) -> None:
    run = verbs.add_parser(
        "run",
        help="run whatever of a recipe is not up to date, or one stage in this process",
        description="`align run RECIPE` runs every stage that is not up to date; `align run STAGE --recipe RECIPE` "
        "runs one in this process, as `accelerate launch -m align run STAGE --recipe RECIPE` does in each of several.",
    )
    run.add_argument("target", metavar="RECIPE|STAGE", help=f"a recipe, or one of: {', '.join(all_stages())}")
    add_recipe_options(run)
    _add_launch_options(run)
    run.set_defaults(run=_run)

    launch = verbs.add_parser("launch", help="print and run the `accelerate launch` command that runs a stage")
    launch.add_argument("target", metavar=f"STAGE|{ALL}")
    add_recipe_options(launch)
    _add_launch_options(launch)
    launch.set_defaults(run=_launch)


def _add_recipe_verbs(verbs: Verbs) -> None:
    for name, run, text in (
        ("plan", _plan, "what of a recipe is done, what is stale and why, and what comes next"),
        ("report", _report, "the tables that `reward` and `evaluate` made, and where the models are"),
    ):
        verb = verbs.add_parser(name, help=text, description=text)
        verb.add_argument("target", metavar="RECIPE")
        add_recipe_options(verb)
        verb.set_defaults(run=run)
    settings = verbs.add_parser("settings", help="every key of a recipe, with type, default and meaning, in Markdown")
    settings.set_defaults(run=_settings)
    # No help: the Makefile's own.
    rules = verbs.add_parser("make-rules")
    rules.add_argument("target", metavar="RECIPE")
    rules.add_argument("--output", type=Path, required=True)
    add_recipe_options(rules)
    _add_launch_options(rules)
    rules.set_defaults(run=_make_rules)


def _add_launch_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nproc", metavar="N", type=positive, help="processes a stage runs in")
    parser.add_argument("--accelerate-config", metavar="FILE", type=Path, help="such as recipes/accelerate/fsdp2.yaml")


def _launch_of(options: argparse.Namespace, by_accelerate: bool = False) -> Launch:
    if options.accelerate_config is not None:
        check_config(options.accelerate_config)
    return Launch(options.nproc, options.accelerate_config, by_accelerate)


def _run(options: argparse.Namespace) -> int:
    launch = _launch_of(options)
    if options.target not in all_stages():
        return _run_recipe(options, options.recipe if options.target == ALL else _only_recipe(options), launch)
    recipe = recipe_of(options, options.recipe)
    if launch.uses_accelerate:
        return launch_stage(recipe, options.target, launch)
    from align.pipeline.runner import run_stage

    run_stage(recipe, options.target)
    return 0


def _only_recipe(options: argparse.Namespace) -> str:
    """The first argument as a recipe."""
    target = str(options.target)
    if Path(target).suffix in {".yaml", ".yml"}:
        if options.recipe is not None:
            raise InputError(f"align run {target}: name the recipe once; leave out --recipe {options.recipe}")
        return target
    raise InputError(
        f"align run {target}: no such stage; there are {', '.join(all_stages())}. "
        "For a whole recipe: align run FILE.yaml"
    )


def _launch(options: argparse.Namespace) -> int:
    launch = _launch_of(options, by_accelerate=True)
    if options.target == ALL:
        return _run_recipe(options, options.recipe, launch)
    return launch_stage(recipe_of(options, options.recipe), options.target, launch)


def _run_recipe(options: argparse.Namespace, path: str | None, launch: Launch) -> int:
    recipe = recipe_of(options, path)
    evaluated_before = "evaluate" not in recipe.settings or make_plan(recipe)["evaluate"].is_done
    code = run_recipe(recipe, launch)
    # evaluate shows the results itself when it runs.
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
            print(f"{stage}: the figures below are stale ({why}); make them anew with `{command}`", file=sys.stderr)
    _print_results(recipe)


def _print_results(recipe: Recipe) -> None:
    """What judge and reward model are worth, then the report where the recipe evaluates, else every stage's folder."""
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


def _settings(options: argparse.Namespace) -> None:
    from align.cli.settings import settings_page

    print(settings_page(), end="")


def _make_rules(options: argparse.Namespace) -> None:
    from align.cli.make_rules import write_rules

    _launch_of(options)  # refuses what no stage could be launched with, before make finds that none need be
    write_rules(recipe_of(options, options.target), options.output)


def _is_one_of_several() -> bool:
    """Whether other processes wait for this one; no where the environment does not say, which is told elsewhere."""
    try:
        return processes.world_size() > 1
    except InputError:
        return False


def _reader_left() -> int:
    """Have nothing more written to the output, whose reader (`head`) has ended; the exit code that shells give this."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 128 + signal.SIGPIPE


def end() -> None:
    """Run, and end this process with the exit code; at once where it is one of several, which would wait for it."""
    die_with_launcher()
    if not sys.stderr.isatty():
        # The libraries' bars of loading and saving; those of the work itself go on.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        code = main()
        sys.stdout.flush()
        sys.stderr.flush()
    except BrokenPipeError:
        code = _reader_left()
    except SystemExit as ended:
        # Rich's consoles end the program so.
        if not isinstance(ended.__context__, BrokenPipeError):
            raise
        code = _reader_left()
    except Exception:
        if not note_failure(AlignError(traceback.format_exc().rstrip())):
            raise
        code = 1
        sys.stdout.flush()
        sys.stderr.flush()
    if _is_one_of_several():
        if code:
            if another_failed_first():
                # The launcher ends it before that, and then counts one failure alone.
                time.sleep(GRACE_SECONDS)
            os._exit(code)
        processes.disconnect()
    sys.exit(code)


if __name__ == "__main__":
    end()
