"""How verbs show their tables in the terminal, and write them as an HTML page."""

from collections.abc import Iterable
from pathlib import Path

from rich.console import Console

from align.figures.tables import Sheet, page, print_sheet, print_written
from align.run.artefacts import write_option_file


def show_sheets(sheets: Iterable[Sheet], console: Console, html: Path | None = None, title: str = "") -> None:
    """Print tables, and write them as a page if the option --html names a file.

    Raises:
        InputError: the page cannot be written.
    """
    shown = list(sheets)
    for sheet in shown:
        print_sheet(sheet, console)
    if html:
        write_option_file(html, page(title, shown), "--html")
        print_written(html, console)
