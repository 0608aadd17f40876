"""`align engine check`: tables of what the engines of a recipe, or a single engine, can do."""

import sys
from collections.abc import Iterator

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from align.engines.check import Finding, check_engine
from align.errors import AlignError, InputError
from align.pipeline.recipe import Recipe
from align.run.progress import hide_loading_bars
from align.settings.blocks import EngineBlock, ModelBlock

MARKS = {True: "[green]yes[/green]", False: "[red]no[/red]", None: ""}


def print_engine_checks(engines: dict[str, EngineBlock], model: ModelBlock, console: Console) -> int:
    """Try each distinct engine once; its table is titled with all the keys that configure it.

    Returns:
        0, or the exit code of the first engine that cannot be loaded or reached, or returns no completion.
    """
    hide_loading_bars()
    distinct: list[EngineBlock] = []
    for engine in engines.values():
        if engine not in distinct:
            distinct.append(engine)
    codes = []
    for engine in distinct:
        users = ", ".join(name for name, each in engines.items() if each == engine)
        title = f"{users}: {_engine_title(engine, model)}"
        try:
            console.print(_table(title, check_engine(engine, model)))
        except AlignError as error:
            print(f"{title}: {error}", file=sys.stderr)
            codes.append(error.exit_code)
    return codes[0] if codes else 0


def engines_of(recipe: Recipe) -> dict[str, EngineBlock]:
    """The recipe's engines by key.

    Raises:
        InputError: no stage of the recipe uses an engine.
    """
    blocks = {**recipe.settings, "judge": recipe.shared["judge"]}
    found = {key: engine for name, block in blocks.items() for key, engine in _engines(name, block)}
    if recipe.shared["judge"].kind == "rule":
        found.pop("judge.engine")
    if not found or recipe.shared["model"] is None:
        raise InputError(f"{recipe.path}: no stage of this recipe uses an engine; name one with --base-url or --model")
    return found


def _engines(name: str, block: object) -> Iterator[tuple[str, EngineBlock]]:
    for key in ("engine", "critic"):
        engine = getattr(block, key, None)
        if isinstance(engine, EngineBlock):
            yield f"{name}.{key}", engine


def _engine_title(engine: EngineBlock, model: ModelBlock) -> str:
    name = engine.model or model.path
    return f"{name} at {engine.base_url or 'https://api.openai.com'}" if engine.kind == "openai" else f"{name}, local"


def _table(title: str, findings: list[Finding]) -> Table:
    table = Table(title=escape(title), title_justify="left", show_lines=False)
    for column in ("capability", "supported", "observed"):
        table.add_column(column)
    for finding in findings:
        table.add_row(finding.capability, MARKS[finding.supported], escape(finding.observed))
    return table
