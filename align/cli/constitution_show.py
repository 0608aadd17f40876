"""`align constitution check` and `show`: checks constitution files, and prints a constitution in the terminal."""

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape

from align.constitution.constitution import Constitution
from align.constitution.loading import load_constitution
from align.constitution.principles import Principle
from align.errors import InputError
from align.figures.tables import printable


def check_constitutions(paths: Sequence[str], console: Console | None = None) -> None:
    """Print a summary of each valid file.

    Raises:
        InputError: some files are invalid; it lists every error in them.
    """
    console = console or Console()
    errors = []
    for path in paths:
        try:
            constitution = load_constitution(path)
        except InputError as error:
            errors.append(str(error))
            continue
        console.print(f"{path}: {_summary(constitution)}", markup=False, highlight=False, soft_wrap=True)
    if errors:
        raise InputError("\n".join(errors))


def show_constitution(path: str, console: Console | None = None) -> None:
    """Print a constitution with everything it inherits through `extends`, in the order of its tiers.

    Raises:
        InputError: it is invalid.
    """
    console = console or Console()
    constitution = load_constitution(path)
    console.print(f"[bold]{_safe(constitution.title)}[/]  {_safe(_summary(constitution))}", highlight=False)
    if origin := _origin(constitution):
        console.print(_safe(origin), highlight=False)
    if constitution.preamble:
        console.print(f"\n{_safe(constitution.preamble.strip())}", highlight=False)
    for tier in (*constitution.tiers, None):
        of_tier = [principle for principle in constitution.principles if principle.tier == tier]
        if of_tier and constitution.tiers:
            console.print(f"\n[bold]tier: {_safe(tier or 'none')}[/]", highlight=False)
        for principle in of_tier:
            _show_principle(constitution, principle, console)
    for kind, items in (("example", constitution.examples), ("choice", constitution.comparisons)):
        for item in items:
            console.print(f"\n[bold]{kind}[/]  {_safe(_first_words(item.prompt[-1].content))}", highlight=False)


def _show_principle(constitution: Constitution, principle: Principle, console: Console) -> None:
    console.print(f"\n[cyan]{principle.id}[/]  {_safe(_traits(constitution, principle))}", highlight=False)
    parts = {
        "": principle.text,
        "not: ": principle.opposite,
        "critique: ": principle.critique,
        "revision: ": principle.revision,
        "choice: ": principle.compare,
        "why: ": principle.rationale,
        "probes: ": "; ".join(_first_words(each.prompt) for each in principle.probes),
        "examples: ": "; ".join(_first_words(each.prompt[-1].content) for each in principle.examples),
        "choices: ": "; ".join(_first_words(each.prompt[-1].content) for each in principle.comparisons),
    }
    for name, text in parts.items():
        if text:
            inside = text.strip().replace("\n", "\n  ")
            console.print(f"  {name}{_safe(inside)}", highlight=False)


def _safe(text: str) -> str:
    """Text from the file, with Rich markup escaped and without terminal control characters."""
    return escape(printable(text))


def _origin(constitution: Constitution) -> str:
    """Version, licence and source of the file, if it names them."""
    parts = {"version": constitution.version, "licence": constitution.licence, "source": constitution.source}
    return "; ".join(f"{name} {text}" for name, text in parts.items() if text)


def _first_words(text: str, width: int = 60) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else f"{line[: width - 1]}…"


def _summary(constitution: Constitution) -> str:
    folders = len(constitution.documents)
    parts = [
        f"{len(constitution.principles)} principles",
        f"{sum(principle.rule is not None for principle in constitution.principles)} with a rule",
        f"{sum(len(principle.probes) for principle in constitution.principles)} probes",
        f"{len(constitution.worked_examples)} examples",
        *([f"{len(constitution.worked_comparisons)} choices"] if constitution.worked_comparisons else []),
        *([f"{folders} folder{'s' * (folders > 1)} of documents"] if folders else []),
        constitution.language,
        constitution.key,
    ]
    return ", ".join(parts)


def _traits(constitution: Constitution, principle: Principle) -> str:
    traits = [
        *([f"weight {principle.weight:g}"] if principle.weight != 1 else []),
        *(["hard"] if principle.hard else []),
        *([principle.framing] if principle.framing != "neutral" else []),
        *([f"tags {', '.join(principle.tags)}"] if principle.tags else []),
        *([f"in {principle.language}"] if principle.language not in (None, constitution.language) else []),
        *([f"uses the documents in {', '.join(sources)}"] if (sources := constitution.sources_of(principle)) else []),
        *([f"applies to {', '.join(principle.applies)}"] if principle.applies else []),
        *([f"rule: {principle.rule}"] if principle.rule else []),
    ]
    return "; ".join(traits)
