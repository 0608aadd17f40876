"""`align data check`: what a file or data set is recognised as, and what training would see of it."""

from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError
from rich.console import Console
from rich.text import Text

from align.data.checking import DataCheck, Example, Kind, check_source, percentiles
from align.data.prompts import CUT
from align.errors import InputError
from align.figures.tables import Sheet, print_sheet, printable
from align.pipeline.recipe import Recipe
from align.pipeline.recipe_files import apply_override
from align.settings.blocks import ModelBlock
from align.settings.data import DataSource, PairSource
from align.settings.validation import problems_from
from align.settings.yaml_files import Lines

EQUAL = "pairs_with_equal_completions"
PERCENTILES = {"shortest": 0.0, "median": 0.5, "90%": 0.9, "95%": 0.95, "99%": 0.99, "longest": 1.0}
SHOWN_CHARACTERS = 600
"""Of each part of a row that is shown; of longer ones the middle is left out."""


def check_data(
    source: DataSource, kind: Kind | None, model: ModelBlock | None, max_length: int | None, console: Console
) -> int:
    """Print what becomes of a source.

    Returns:
        0, or 2 if a stage that reads the source would stop.
    """
    tokenizer = _tokenizer(model)
    system_prompt = model.system_prompt if model else None
    check = check_source(source, kind, tokenizer=tokenizer, system_prompt=system_prompt, max_length=max_length)
    console.print(Text(f"{source.title}: {check.rows} rows, read as {check.kind}", style="bold"))
    for sheet in sheets(check, max_length, in_tokens=tokenizer is not None):
        print_sheet(sheet, console)
    for number, example in enumerate(check.examples, start=1):
        _print_example(number, example, console)
    if tokenizer is None:
        console.print("Without --model or --recipe, lengths are in characters and no chat template renders the rows.")
    for problem in check.problems:
        console.print(Text(f"{source.title}: {problem}", style="red"))
    return InputError.exit_code if check.problems else 0


def sheets(check: DataCheck, max_length: int | None, *, in_tokens: bool) -> list[Sheet]:
    """The tables of a report: layouts, what becomes of the rows, and lengths."""
    layouts = tuple((name, f"{count}") for name, count in check.layouts.most_common())
    unit = "tokens" if in_tokens else "characters"
    lengths = tuple(
        (name, *(f"{length}" for length in percentiles(found, list(PERCENTILES.values()))))
        for name, found in check.lengths.items()
    )
    return [
        Sheet("Recognised as", ("layout", "rows"), layouts),
        Sheet("What becomes of them", ("outcome", "rows"), _outcomes(check, max_length), _fault_lines(check)),
        Sheet(f"Lengths in {unit}", ("part", *PERCENTILES), lengths),
    ]


def _outcomes(check: DataCheck, max_length: int | None) -> tuple[tuple[str, str], ...]:
    rows = {f"used as {check.kind}": check.records - check.too_long}
    rows |= {_left_out(reason, check.kind): count for reason, count in sorted(check.left_out.items())}
    if check.kind == "pairs":
        rows.setdefault(_left_out(EQUAL, check.kind), 0)
    if max_length:
        rows[f"left out: longer than {max_length} tokens"] = check.too_long
    rows |= {_in_words(name, check.kind): count for name, count in check.other_counts.items()}
    rows |= {"repeated (used once)": check.repeated, "cut": check.other_counts.get(CUT, 0)}
    return tuple((name, f"{count}") for name, count in rows.items())


def _left_out(reason: str, kind: str) -> str:
    return "left out: " + ("chosen = rejected" if reason == EQUAL else _in_words(reason, kind))


def _in_words(name: str, kind: str) -> str:
    return name.removeprefix(f"{kind}_").replace("_", " ")


def _fault_lines(check: DataCheck) -> tuple[str, ...]:
    return tuple(
        f"{_left_out(reason, check.kind)}: {fault.why or fault.place}"
        for reason, faults in sorted(check.faults.items())
        for fault in faults
    )


def _print_example(number: int, example: Example, console: Console) -> None:
    label = "" if example.probability is None else f", p(chosen is better) = {example.probability:.3g}"
    console.print(Text(f"\nRow {number} ({printable(example.place)}{label})", style="bold"))
    for part in example.parts:
        mark = "counts" if part.counts else "masked"
        style = "green" if part.counts else "dim"
        console.print(Text(f"{part.name} [{mark}]", style="bold"), Text(_middle_left_out(part.text), style=style))


def _middle_left_out(text: str) -> str:
    shown = printable(text)
    half = SHOWN_CHARACTERS // 2
    return shown if len(shown) <= SHOWN_CHARACTERS else f"{shown[:half]} […] {shown[-half:]}"


def _tokenizer(model: ModelBlock | None) -> Any:
    if model is None:
        return None
    from align.models.loading import load_tokenizer

    return load_tokenizer(model.path, revision=model.revision, trust_remote_code=model.trust_remote_code)


def source_of_recipe(recipe: Recipe, path: str) -> DataSource | None:
    """The recipe's source that names the path; None if there is none."""
    return next((source for source in recipe.sources() if path in source.paths), None)


def source_of_options(found: DataSource | None, path: str, overrides: Sequence[str]) -> DataSource:
    """A source of the path, with the settings that the recipe and the overrides give it.

    Raises:
        InputError: an override is not valid.
    """
    kind = type(found) if found else PairSource
    content: dict[str, Any] = {**(found.model_dump(exclude_unset=True) if found else {}), "path": path}
    try:
        for override in overrides:
            apply_override(content, override)
    except ValueError as error:
        raise InputError(f"--set {override}: {error}") from None
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        problems = problems_from(error, Lines("--set"), kind)
        raise InputError("\n".join(f"--set {problem}" for problem in problems)) from None


def max_length_of_recipe(recipe: Recipe, kind: Kind | None) -> int | None:
    """The limit that the recipe's stages put on rows of this kind."""
    stages = {"demonstrations": ("sft",), "prompts": ()}.get(kind or "pairs", ("reward", "dpo"))
    blocks: list[Any] = [recipe.settings[name] for name in stages if name in recipe.settings]
    if kind == "prompts" and recipe.shared["prompts"]:
        return recipe.shared["prompts"].max_tokens  # type: ignore[no-any-return]
    return min((block.max_length for block in blocks), default=None)
