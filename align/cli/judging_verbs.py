"""The verbs `align engine check`, `align judge calibrate` and `align relabel`."""

import argparse
from pathlib import Path

from align.cli.options import Verbs, add_group, add_recipe_options, add_verb, positive, recipe_of
from align.errors import InputError


def add_judging_verbs(verbs: Verbs) -> None:
    """Add the verbs, in the order in which the help lists them."""
    _add_engine_check(add_group(verbs, "engine", "check", "find out what an inference engine can do"))
    _add_calibrate(add_group(verbs, "judge", "calibrate", "test a judge against people's preferences"))
    _add_relabel(verbs)


def _add_engine_check(group: Verbs) -> None:
    text = "try the engines of a recipe, a server, or a local model, and show what each can do"
    check = add_verb(group, "check", _check_engines, text)
    add_recipe_options(check)
    check.add_argument("--base-url", metavar="URL", help="address of a server, which usually ends in /v1")
    check.add_argument("--model", metavar="MODEL", help="its name on the server; without --base-url, a local model")


def _add_calibrate(group: Verbs) -> None:
    text = "measure how well a judge's soft labels agree with people, on pairs that people labelled"
    calibrate = add_verb(group, "calibrate", _calibrate, text)
    add_recipe_options(calibrate)
    calibrate.add_argument("--model", metavar="MODEL", help="the judge's model (without --recipe)")
    calibrate.add_argument("--kind", choices=("choice", "contrast", "rule"), help="kind of judge (without --recipe)")
    calibrate.add_argument("--pairs", metavar="FILE", nargs="+", default=[], help="JSONL(.gz), parquet or hub id")
    calibrate.add_argument("--hub-split", metavar="NAME", default="train", help="split of hub data (default: train)")
    calibrate.add_argument("--limit", metavar="N", type=positive, help="pairs of each file at most, drawn by a hash")
    calibrate.add_argument("--draw", action="store_true", help="judge by one drawn principle a pair (default: by all)")
    calibrate.add_argument("--output", metavar="DIR", type=Path, help="(default: a folder in runs/calibration)")
    calibrate.add_argument("--plot", metavar="FILE", type=Path, help="where to write the reliability plot")
    calibrate.add_argument("--json", metavar="FILE", type=Path, help="where to write the figures")


def _add_relabel(verbs: Verbs) -> None:
    text = "recompute a run's preference labels with other settings or principles, from stored scores, asking no model"
    relabel = add_verb(verbs, "relabel", _relabel, text)
    relabel.add_argument("source", metavar="RUN", type=Path, help="a run's folder, or its compare folder")
    relabel.add_argument("--output", metavar="DIR", type=Path, required=True, help="a new folder for the labels")
    relabel.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="such as judge.clamp=0.1")
    relabel.add_argument("--constitution", metavar="FILE", help="take weights, tiers and rules from this constitution")
    relabel.add_argument("--principles", metavar="ID,ID", default="", help="principles that count (default: all)")


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

    from align.cli.judge_calibrate import calibrate, judge_of_options, judge_of_recipe
    from align.settings.data import PairSource

    if options.recipe and (options.model or options.kind):
        raise InputError("--model and --kind are for a judge without a recipe; use --set model.path=… or judge.kind=…")
    if options.recipe is None and options.set:
        raise InputError("--set changes a recipe; add --recipe FILE")
    test = (
        judge_of_recipe(recipe_of(options, options.recipe))
        if options.recipe
        else judge_of_options(options.constitution, options.model, options.kind)
    )
    if options.pairs:
        sources = (PairSource(path=path, limit=options.limit, hub_split=options.hub_split) for path in options.pairs)
        test = replace(test, pairs=tuple(sources))
    if options.draw:
        test = replace(test, draws_principle=True)
    calibrate(test, output=options.output, plot=options.plot, json=options.json)


def _relabel(options: argparse.Namespace) -> None:
    from align.results.relabel import relabel
    from align.run.artefacts import NOT_RELABELLED

    counts = relabel(
        options.source,
        options.output,
        overrides=options.set,
        constitution=options.constitution,
        principles=[name for name in options.principles.split(",") if name],
    )
    print(", ".join(f"{name} {count}" for name, count in counts.items()) + f" ({options.output})")
    if kept := counts.get(NOT_RELABELLED):
        print(
            f"{kept} revision pairs keep the label that `revise` gave them, since their scores were not kept. Run "
            "`revise` and `compare` again to relabel them too."
        )
