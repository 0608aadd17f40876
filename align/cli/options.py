"""Options that several verbs share."""

import argparse
from typing import TypeAlias

from align.errors import InputError
from align.pipeline.recipe import Recipe, load_recipe

Verbs: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_recipe_options(parser: argparse.ArgumentParser) -> None:
    """The options that name a recipe and change it."""
    parser.add_argument("--recipe", metavar="RECIPE", help="the recipe, where the first argument is a stage")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="change a key of the recipe")
    parser.add_argument("--constitution", metavar="FILE", help="short for --set constitution=FILE")


def positive(text: str) -> int:
    """A count, as argparse reads it."""
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text}")
    return int(text)


def recipe_of(options: argparse.Namespace, path: str | None) -> Recipe:
    """The recipe in a file, changed as the options say.

    Raises:
        InputError: there is no such file, or it has faults.
    """
    if path is None:
        raise InputError("which recipe? Add --recipe FILE, such as --recipe recipes/quickstart.yaml")
    chosen = [f"constitution={options.constitution}"] if options.constitution else []
    return load_recipe(path, [*options.set, *chosen])
