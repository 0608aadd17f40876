"""The verb `align data check`."""

import argparse

from align.cli.options import Verbs, add_group, add_verb, positive
from align.errors import InputError


def add_data_verbs(verbs: Verbs) -> None:
    """Add the verb."""
    group = add_group(verbs, "data", "check", "look at data before training")
    text = "show what a file or data set is recognised as, how rows are rendered and masked, and which are left out"
    check = add_verb(group, "check", _check, text)
    check.add_argument("source", metavar="FILE_OR_ID", help="a file, pattern, folder or hub id")
    check.add_argument("--as", dest="kind", choices=("pairs", "demonstrations", "prompts"), help="(default: by layout)")
    check.add_argument("--model", metavar="MODEL", help="whose chat template and tokens to use")
    check.add_argument("--recipe", metavar="RECIPE", help="take the model, limits and source settings from this recipe")
    check.add_argument("--max-length", metavar="N", type=positive, help="tokens; the recipe's by default")
    check.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="a setting of the source, such as hub_split=test, columns.prompt=ask or margin_scale=0.5",
    )


def _check(options: argparse.Namespace) -> int:
    from rich.console import Console

    from align.cli.data_check import check_data, max_length_of_recipe, source_of_options, source_of_recipe
    from align.pipeline.recipe import load_recipe
    from align.settings.blocks import ModelBlock

    if options.recipe and options.model:
        raise InputError("--recipe names the model; leave out --model")
    model = ModelBlock(path=options.model) if options.model else None
    max_length, found = options.max_length, None
    if options.recipe:
        recipe = load_recipe(options.recipe)
        model, found = recipe.shared["model"], source_of_recipe(recipe, options.source)
        max_length = max_length or max_length_of_recipe(recipe, options.kind)
    source = source_of_options(found, options.source, options.set)
    return check_data(source, options.kind, model, max_length, Console())
