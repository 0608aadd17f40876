"""What the verbs of the command line share: how they are added, and the options that several of them have."""

import argparse
from collections.abc import Callable
from typing import TypeAlias

from align.errors import InputError
from align.pipeline.recipe import Recipe, load_recipe

Verbs: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_verb(
    verbs: Verbs, name: str, run: Callable[[argparse.Namespace], int | None], summary: str, description: str = ""
) -> argparse.ArgumentParser:
    """Add a verb that `run` carries out. Its own help shows the description, or else the summary."""
    sentence = f"{summary[0].upper()}{summary[1:]}."
    verb = verbs.add_parser(name, help=summary, description=description or sentence)
    verb.set_defaults(run=run)
    return verb


def add_group(verbs: Verbs, name: str, members: str, summary: str) -> Verbs:
    """Add a verb that consists of others, such as `align judge calibrate`."""
    group = verbs.add_parser(name, help=summary, description=summary)
    return group.add_subparsers(metavar=members, required=True)


def add_recipe_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that name a recipe and change it."""
    parser.add_argument("--recipe", metavar="RECIPE", help="the recipe file, unless the first argument names it")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="change one key of the recipe")
    parser.add_argument("--constitution", metavar="FILE", help="the constitution; same as --set constitution=FILE")


def positive(text: str) -> int:
    """The argparse type of a whole number above 0."""
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text}")
    return int(text)


def recipe_of(options: argparse.Namespace, path: str | None) -> Recipe:
    """The recipe at `path`, changed as the options say.

    Raises:
        InputError: no recipe is named, or it cannot be read or is invalid.
    """
    if path is None:
        raise InputError("which recipe? Add --recipe FILE, such as --recipe recipes/quickstart.yaml")
    chosen = [f"constitution={options.constitution}"] if options.constitution else []
    return load_recipe(path, [*options.set, *chosen])
