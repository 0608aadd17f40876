"""`align engine check`, `judge calibrate` and `relabel`."""

import argparse
from pathlib import Path

from align.cli.options import Verbs, add_recipe_options, positive, recipe_of
from align.errors import InputError


def add_engine(verbs: Verbs) -> None:
    """Add `align engine check`."""
    engine = verbs.add_parser("engine", help="find out what an engine can do")
    kinds = engine.add_subparsers(metavar="check", required=True)
    text = "try the engines of a recipe, a server, or a model in this process, and print what each can do"
    check = kinds.add_parser("check", help=text, description=text)
    add_recipe_options(check)
    check.add_argument("--base-url", metavar="URL", help="a server's address, which mostly ends in /v1")
    check.add_argument("--model", metavar="MODEL", help="the name that the server serves, or a model to be loaded here")
    check.set_defaults(run=_check_engines)


def add_judge(verbs: Verbs) -> None:
    """Add `align judge calibrate`."""
    judge = verbs.add_parser("judge", help="test a judge")
    kinds = judge.add_subparsers(metavar="calibrate", required=True)
    text = "how far a judge's soft labels are those of people, on pairs that people labelled"
    calibrate = kinds.add_parser("calibrate", help=text, description=text)
    add_recipe_options(calibrate)
    calibrate.add_argument("--model", metavar="MODEL", help="without a recipe: the model that judges")
    calibrate.add_argument("--kind", choices=("choice", "contrast", "rule"), help="without a recipe: how it judges")
    calibrate.add_argument("--pairs", metavar="FILE", nargs="+", default=[], help="JSONL(.gz), parquet or hub id")
    calibrate.add_argument("--hub-split", metavar="NAME", default="train", help="of hub datasets (default: train)")
    calibrate.add_argument("--limit", metavar="N", type=positive, help="pairs of each, drawn by a hash of the content")
    calibrate.add_argument("--draw", action="store_true", help="one drawn principle a pair; without it, all that apply")
    calibrate.add_argument("--output", metavar="DIR", type=Path, help="default: a folder in runs/calibration")
    calibrate.add_argument("--plot", metavar="FILE", type=Path, help="where the reliability plot goes")
    calibrate.add_argument("--json", metavar="FILE", type=Path, help="where the figures go")
    calibrate.set_defaults(run=_calibrate)


def add_relabel(verbs: Verbs) -> None:
    """Add `align relabel`."""
    text = "make compare's labels again, with other settings or principles, from the scores it kept; asks no model"
    verb = verbs.add_parser("relabel", help=text, description=text)
    verb.add_argument("source", metavar="RUN", type=Path, help="a run's folder, or its compare stage's")
    verb.add_argument("--output", metavar="DIR", type=Path, required=True, help="a new folder for the labels")
    verb.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="such as judge.clamp=0.1")
    verb.add_argument("--constitution", metavar="FILE", help="its weights, tiers and rules in place of the run's own")
    verb.add_argument("--principles", metavar="ID,ID", default="", help="the principles that count; all without it")
    verb.set_defaults(run=_relabel)


def _check_engines(options: argparse.Namespace) -> int:
    from pydantic import ValidationError
    from rich.console import Console

    from align.cli.engine_check import engines_of, print_engine_checks
    from align.settings.blocks import EngineBlock, ModelBlock

    if options.recipe:
        recipe = recipe_of(options, options.recipe)
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

    from align.cli.judge_calibrate import main as calibrate
    from align.cli.judge_calibrate import of_options, of_recipe
    from align.settings.blocks import PairSource

    if options.recipe and (options.model or options.kind):
        raise InputError("--model and --kind are for a judge without a recipe; use --set model.path=… or judge.kind=…")
    if options.recipe is None and options.set:
        raise InputError("--set changes a recipe; add --recipe FILE")
    tested = (
        of_recipe(recipe_of(options, options.recipe))
        if options.recipe
        else of_options(options.constitution, options.model, options.kind)
    )
    if options.pairs:
        sources = (PairSource(path=path, limit=options.limit, hub_split=options.hub_split) for path in options.pairs)
        tested = replace(tested, pairs=tuple(sources))
    if options.draw:
        tested = replace(tested, draws=True)
    calibrate(tested, output=options.output, plot=options.plot, json=options.json)


def _relabel(options: argparse.Namespace) -> None:
    from align.results.relabel import relabel
    from align.run.artefacts import NOT_RELABELLED

    counted = relabel(
        options.source,
        options.output,
        overrides=options.set,
        constitution=options.constitution,
        principles=[name for name in options.principles.split(",") if name],
    )
    print(", ".join(f"{name} {count}" for name, count in counted.items()) + f" ({options.output})")
    if kept := counted.get(NOT_RELABELLED):
        print(
            f"{kept} pairs of revisions have the label that `revise` gave them then: their scores were not kept. Run "
            "`revise` and `compare` again to have labels of these made again too."
        )
