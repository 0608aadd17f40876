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

from align import processes
from align.errors import AlignError, InputError
from align.failure_note import follows_from_another, note_failure
from align.launch import INTERRUPTED, PATIENCE_SECONDS, Launch, die_with_launcher, launch_stage, run_recipe
from align.plan import make_plan
from align.recipe import Recipe, load_recipe
from align.stages import all_stages
from align.world import check_config

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
    _add_constitution(verbs)
    _add_engine(verbs)
    _add_judge(verbs)
    _add_looking(verbs)
    return parser


def _add_run(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    run = verbs.add_parser(
        "run",
        help="run whatever of a recipe is not up to date, or one stage in this process",
        description="`align run RECIPE` runs every stage that is not up to date; `align run STAGE --recipe RECIPE` "
        "runs one in this process, as `accelerate launch -m align run STAGE --recipe RECIPE` does in each of several.",
    )
    run.add_argument("target", metavar="RECIPE|STAGE", help=f"a recipe, or one of: {', '.join(all_stages())}")
    _add_recipe_options(run)
    _add_launch_options(run)
    run.set_defaults(run=_run)

    launch = verbs.add_parser("launch", help="print and run the `accelerate launch` command that runs a stage")
    launch.add_argument("target", metavar=f"STAGE|{ALL}")
    _add_recipe_options(launch)
    _add_launch_options(launch)
    launch.set_defaults(run=_launch)


def _add_recipe_verbs(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    for name, run, text in (
        ("plan", _plan, "what of a recipe is done, what is stale and why, and what comes next"),
        ("report", _report, "the tables that `reward` and `evaluate` made, and where the models are"),
    ):
        verb = verbs.add_parser(name, help=text, description=text)
        verb.add_argument("target", metavar="RECIPE")
        _add_recipe_options(verb)
        verb.set_defaults(run=run)
    settings = verbs.add_parser("settings", help="every key of a recipe, with type, default and meaning, in Markdown")
    settings.set_defaults(run=_settings)
    # No help: the Makefile's own.
    rules = verbs.add_parser("make-rules")
    rules.add_argument("target", metavar="RECIPE")
    rules.add_argument("--output", type=Path, required=True)
    _add_recipe_options(rules)
    _add_launch_options(rules)
    rules.set_defaults(run=_make_rules)


def _add_constitution(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    constitution = verbs.add_parser("constitution", help="check, show or compare constitutions")
    kinds = constitution.add_subparsers(metavar="check|show|schema|diff|stats", required=True)
    check = kinds.add_parser("check", help="say what files hold, or every fault of theirs")
    check.add_argument("files", metavar="FILE", nargs="+")
    check.set_defaults(run=_check_constitutions)
    show = kinds.add_parser("show", help="print a constitution as it stands after `extends`")
    show.add_argument("file", metavar="FILE")
    show.set_defaults(run=_show_constitution)
    schema = kinds.add_parser("schema", help="print the JSON schema, with which editors complete and check the files")
    schema.set_defaults(run=_constitution_schema)
    _add_constitution_diff(kinds)


def _add_constitution_diff(kinds: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    text = "what differs between two constitutions: their texts, and the labels a judge gives the same pairs"
    diff = kinds.add_parser("diff", help=text, description=text)
    diff.add_argument("a", metavar="A", type=Path)
    diff.add_argument("b", metavar="B", type=Path)
    pairs = diff.add_mutually_exclusive_group()
    pairs.add_argument("--pairs", metavar="FILE|RUN", type=Path, help="preferences, or a run whose compare is done")
    pairs.add_argument("--recipe", metavar="RECIPE", help="the pairs of this recipe's run under its constitution")
    diff.add_argument("--judge", choices=("rule", "contrast", "choice"), help="(default: the run's own; else rule)")
    diff.add_argument("--judge-model", metavar="MODEL", help="the model that judges; by contrast unless said otherwise")
    diff.add_argument("--draw", action="store_true", help="draw one principle a pair, A with two seeds")
    diff.add_argument("--null", metavar="FILE", type=Path, help="A in other words (default: A-paraphrased.yaml)")
    diff.add_argument("--placebo", metavar="FILE", type=Path, help="(default: placebo.yaml beside A)")
    diff.add_argument("--limit", metavar="N", type=_positive, default=300, help="pairs judged (default: 300)")
    diff.add_argument("--html", metavar="FILE", type=Path, help="write the difference as a page too")
    diff.add_argument("--json", metavar="FILE", type=Path, help="and as JSON")
    diff.set_defaults(run=_diff_constitutions)

    text = "by principle: draws, faults found, revisions accepted, wins, agreement with the rest and with people"
    stats = kinds.add_parser("stats", help=text, description=text)
    stats.add_argument("run_folder", metavar="RUN", type=Path)
    stats.add_argument("--constitution", metavar="FILE", type=Path, help="the run's own (default: the shipped one)")
    stats.add_argument("--human", metavar="FILE", type=Path, help="preferences of people, judged by the run's judge")
    stats.add_argument("--limit", metavar="N", type=_positive, default=300, help="pairs of them (default: 300)")
    stats.set_defaults(run=_constitution_stats)


def _add_engine(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    engine = verbs.add_parser("engine", help="find out what an engine can do")
    kinds = engine.add_subparsers(metavar="check", required=True)
    text = "try the engines of a recipe, a server, or a model in this process, and print what each can do"
    check = kinds.add_parser("check", help=text, description=text)
    _add_recipe_options(check)
    check.add_argument("--base-url", metavar="URL", help="a server's address, which mostly ends in /v1")
    check.add_argument("--model", metavar="MODEL", help="the name that the server serves, or a model to be loaded here")
    check.set_defaults(run=_check_engines)


def _add_judge(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    judge = verbs.add_parser("judge", help="test a judge")
    kinds = judge.add_subparsers(metavar="calibrate", required=True)
    text = "how far a judge's soft labels are those of people, on pairs that people labelled"
    calibrate = kinds.add_parser("calibrate", help=text, description=text)
    _add_recipe_options(calibrate)
    calibrate.add_argument("--model", metavar="MODEL", help="without a recipe: the model that judges")
    calibrate.add_argument("--kind", choices=("choice", "contrast", "rule"), help="without a recipe: how it judges")
    calibrate.add_argument("--pairs", metavar="FILE", nargs="+", default=[], help="JSONL(.gz), parquet or hub id")
    calibrate.add_argument("--hub-split", metavar="NAME", default="train", help="of hub datasets (default: train)")
    calibrate.add_argument("--limit", metavar="N", type=_positive, help="pairs of each, drawn by a hash of the content")
    calibrate.add_argument("--draw", action="store_true", help="one drawn principle a pair; without it, all that apply")
    calibrate.add_argument("--output", metavar="DIR", type=Path, help="default: a folder in runs/calibration")
    calibrate.add_argument("--plot", metavar="FILE", type=Path, help="where the reliability plot goes")
    calibrate.add_argument("--json", metavar="FILE", type=Path, help="where the figures go")
    calibrate.set_defaults(run=_calibrate)


def _add_looking(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    chat = verbs.add_parser("chat", help="talk to a model")
    chat.add_argument("model", metavar="MODEL", help="a model, or the folder of a stage that made one")
    chat.add_argument("--system", metavar="TEXT", help="system prompt")
    chat.add_argument("--max-new-tokens", type=int, default=512)
    chat.add_argument("--temperature", type=float, default=0.7, help="0 takes the likeliest token (default: 0.7)")
    chat.add_argument("--seed", type=int)
    chat.set_defaults(run=_chat)

    compare = verbs.add_parser("compare-runs", help="completions and figures of two evaluated runs, side by side")
    compare.add_argument("run_a", metavar="RUN_A", type=Path)
    compare.add_argument("run_b", metavar="RUN_B", type=Path)
    compare.add_argument("--limit", type=int, default=5, help="prompts whose completions are shown (default: 5)")
    compare.add_argument("--null", metavar="RUN", type=Path, help="a run that should not differ from RUN_A")
    compare.add_argument("--html", metavar="FILE", type=Path, help="write the comparison as a page too")
    compare.set_defaults(run=_compare_runs)

    _add_export(verbs)
    _add_relabel(verbs)
    text = "proxy and gold reward of a finished run by the distance from its SFT policy"
    study = verbs.add_parser("overoptimisation", help=text, description=text)
    study.add_argument("target", metavar="RUN", type=Path)
    study.add_argument("--gold", metavar="NAME", help="the gold source, where the recipe has several")
    plots = study.add_mutually_exclusive_group()
    plots.add_argument("--plot", metavar="FILE", type=Path, help="where it goes (default: RUN/overoptimisation.svg)")
    plots.add_argument("--no-plot", action="store_true", help="table and JSON alone, which need no matplotlib")
    study.set_defaults(run=_overoptimisation)


def _add_export(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    text = "a run's rows as a data set for the hub: parquet in TRL's formats, and a card that says how it was made"
    export = verbs.add_parser("export", help=text, description=text)
    export.add_argument("run_folder", metavar="RUN", type=Path, help="such as runs/RECIPE/RUN")
    export.add_argument("--output", metavar="FOLDER", type=Path, required=True, help="a new or empty folder")
    choices = ("preferences", "sft", "revisions")
    export.add_argument("--what", nargs="+", choices=choices, default=[], help="(default: all that the run has)")
    export.add_argument("--constitution", metavar="FILE", type=Path, help="the run's, where it keeps no copy")
    export.add_argument("--overwrite", action="store_true", help="replace an earlier export in the folder")
    export.set_defaults(run=_export)


def _add_relabel(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    text = "make compare's labels again, with other settings or principles, from the scores it kept; asks no model"
    verb = verbs.add_parser("relabel", help=text, description=text)
    verb.add_argument("source", metavar="RUN", type=Path, help="a run's folder, or its compare stage's")
    verb.add_argument("--output", metavar="DIR", type=Path, required=True, help="a new folder for the labels")
    verb.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="such as judge.clamp=0.1")
    verb.add_argument("--constitution", metavar="FILE", help="its weights, tiers and rules in place of the run's own")
    verb.add_argument("--principles", metavar="ID,ID", default="", help="the principles that count; all without it")
    verb.set_defaults(run=_relabel)


def _add_recipe_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", metavar="RECIPE", help="the recipe, where the first argument is a stage")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="change a key of the recipe")
    parser.add_argument("--constitution", metavar="FILE", help="short for --set constitution=FILE")


def _add_launch_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nproc", metavar="N", type=_positive, help="processes a stage runs in")
    parser.add_argument("--accelerate-config", metavar="FILE", type=Path, help="such as recipes/accelerate/fsdp2.yaml")


def _positive(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text}")
    return int(text)


def _recipe(options: argparse.Namespace, path: str | None) -> Recipe:
    if path is None:
        raise InputError("which recipe? Add --recipe FILE, such as --recipe recipes/quickstart.yaml")
    chosen = [f"constitution={options.constitution}"] if options.constitution else []
    return load_recipe(path, [*options.set, *chosen])


def _launch_of(options: argparse.Namespace, by_accelerate: bool = False) -> Launch:
    if options.accelerate_config is not None:
        check_config(options.accelerate_config)
    return Launch(options.nproc, options.accelerate_config, by_accelerate)


def _run(options: argparse.Namespace) -> int:
    launch = _launch_of(options)
    if options.target not in all_stages():
        return _run_recipe(options, options.recipe if options.target == ALL else _only_recipe(options), launch)
    recipe = _recipe(options, options.recipe)
    if launch.uses_accelerate:
        return launch_stage(recipe, options.target, launch)
    from align.runner import run_stage

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
    return launch_stage(_recipe(options, options.recipe), options.target, launch)


def _run_recipe(options: argparse.Namespace, path: str | None, launch: Launch) -> int:
    recipe = _recipe(options, path)
    evaluated_before = "evaluate" not in recipe.settings or make_plan(recipe)["evaluate"].is_done
    code = run_recipe(recipe, launch)
    # evaluate shows the results itself when it runs.
    if code == 0 and evaluated_before:
        _print_results(recipe)
    return code


def _plan(options: argparse.Namespace) -> None:
    from rich.console import Console

    from align.plan_view import print_plan

    print_plan(_recipe(options, options.target), Console())


def _report(options: argparse.Namespace) -> None:
    recipe = _recipe(options, options.target)
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
        from align.calibration import print_published_calibration

        print_published_calibration(recipe.directory("compare"))
    if "reward" in recipe.settings:
        from align.held_out import print_published_held_out

        print_published_held_out(recipe.directory("reward"))
    if "evaluate" in recipe.settings:
        from align.report import print_published_report

        print_published_report(recipe.directory("evaluate"))
        return
    for stage in recipe.settings:
        print(f"{stage:>8}  {recipe.directory(stage)}")


def _settings(options: argparse.Namespace) -> None:
    from align.settings_view import settings_page

    print(settings_page(), end="")


def _make_rules(options: argparse.Namespace) -> None:
    from align.make_rules import write_rules

    _launch_of(options)  # refuses what no stage could be launched with, before make finds that none need be
    write_rules(_recipe(options, options.target), options.output)


def _check_constitutions(options: argparse.Namespace) -> None:
    from rich.console import Console

    from align.constitution_view import check_constitutions

    check_constitutions(options.files, Console())


def _show_constitution(options: argparse.Namespace) -> None:
    from rich.console import Console

    from align.constitution_view import show_constitution

    show_constitution(options.file, Console())


def _constitution_schema(options: argparse.Namespace) -> None:
    from align.constitution_schema import schema_page

    print(schema_page(), end="")


def _check_engines(options: argparse.Namespace) -> int:
    from pydantic import ValidationError
    from rich.console import Console

    from align.config import EngineBlock, ModelBlock
    from align.engine_check_view import engines_of, print_engine_checks

    if options.recipe:
        recipe = _recipe(options, options.recipe)
        return print_engine_checks(engines_of(recipe), recipe.shared["model"], Console())
    if not options.model:
        raise InputError("which engine? Add --recipe FILE, or --model MODEL with or without --base-url URL")
    server = {"kind": "openai", "model": options.model, "base_url": options.base_url} if options.base_url else {}
    try:
        engine = EngineBlock(**server)
    except ValidationError as error:
        raise InputError(f"--base-url: {error.errors()[0]['ctx']['error']}") from None
    return print_engine_checks({"engine": engine}, ModelBlock(path=options.model), Console())


def _calibrate(options: argparse.Namespace) -> None:
    from dataclasses import replace

    from align.calibration_view import main as calibrate
    from align.calibration_view import of_options, of_recipe
    from align.config import PairSource

    if options.recipe and (options.model or options.kind):
        raise InputError("--model and --kind are for a judge without a recipe; use --set model.path=… or judge.kind=…")
    if options.recipe is None and options.set:
        raise InputError("--set changes a recipe; add --recipe FILE")
    tested = (
        of_recipe(_recipe(options, options.recipe))
        if options.recipe
        else of_options(options.constitution, options.model, options.kind)
    )
    if options.pairs:
        sources = (PairSource(path=path, limit=options.limit, hub_split=options.hub_split) for path in options.pairs)
        tested = replace(tested, pairs=tuple(sources))
    if options.draw:
        tested = replace(tested, draws=True)
    calibrate(tested, output=options.output, plot=options.plot, json=options.json)


def _diff_constitutions(options: argparse.Namespace) -> None:
    from align.constitution_diff_view import main as diff

    pairs = load_recipe(options.recipe).directory("compare") if options.recipe else options.pairs
    diff(
        options.a,
        options.b,
        pairs=pairs,
        kind=options.judge,
        model=options.judge_model,
        draws=options.draw,
        null=options.null,
        placebo=options.placebo,
        limit=options.limit,
        html=options.html,
        json=options.json,
    )


def _constitution_stats(options: argparse.Namespace) -> None:
    from align.constitution_stats_view import main as stats

    stats(options.run_folder, constitution=options.constitution, human=options.human, limit=options.limit)


def _chat(options: argparse.Namespace) -> int:
    try:
        from align.chat import chat

        chat(
            options.model,
            system_prompt=options.system,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            seed=options.seed,
        )
    except KeyboardInterrupt:
        # There is nothing that the same command would go on with.
        return INTERRUPTED
    return 0


def _compare_runs(options: argparse.Namespace) -> None:
    from align.compare_runs import main as compare

    compare(options.run_a, options.run_b, limit=options.limit, html=options.html, null=options.null)


def _overoptimisation(options: argparse.Namespace) -> None:
    from align.overoptimisation_view import main as study

    study(options.target, gold=options.gold, plot=options.plot, with_plot=not options.no_plot)


def _export(options: argparse.Namespace) -> None:
    from align.export_view import main as export

    export(
        options.run_folder,
        options.output,
        what=options.what,
        constitution=options.constitution,
        overwrite=options.overwrite,
    )


def _is_one_of_several() -> bool:
    """Whether other processes wait for this one; no where the environment does not say, which is told elsewhere."""
    try:
        return processes.world_size() > 1
    except InputError:
        return False


def _relabel(options: argparse.Namespace) -> None:
    from align.relabel import relabel

    counted = relabel(
        options.source,
        options.output,
        overrides=options.set,
        constitution=options.constitution,
        principles=[name for name in options.principles.split(",") if name],
    )
    print(", ".join(f"{name} {count}" for name, count in counted.items()) + f" ({options.output})")


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
            if follows_from_another():
                # The launcher ends it before that, and then counts one failure alone.
                time.sleep(PATIENCE_SECONDS)
            os._exit(code)
        processes.disconnect()
    sys.exit(code)


if __name__ == "__main__":
    end()
