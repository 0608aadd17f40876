"""Tables for the terminal and as HTML pages. Cells are plain text from any source, and are never read as markup."""

import html
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from align.records import Conversation

_KEPT = "\n\u200c\u200d"  # joiners hold emoji and Indic letters together
_LABEL_WIDTH = 8
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 80rem; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; }
caption { font-weight: 600; padding: .5rem 0; text-align: left; }
th, td { border: 1px solid #8886; overflow-wrap: anywhere; padding: .3rem .6rem; text-align: left;
  vertical-align: top; white-space: pre-wrap; }
td.number { font-variant-numeric: tabular-nums; text-align: right; }
"""


@dataclass(frozen=True)
class Sheet:
    """A titled table with remarks below it. The first `labels` columns contain words, the others figures."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    remarks: tuple[str, ...] = ()
    labels: int = 1


def print_sheet(sheet: Sheet, console: Console) -> None:
    """Print a sheet to the terminal."""
    table = Table(title=Text(printable(sheet.title)), title_justify="left", show_lines=True)
    for number, (column, width) in enumerate(zip(sheet.columns, _widths(sheet, console.width), strict=True)):
        justify: Literal["left", "right"] = "left" if number < sheet.labels else "right"
        table.add_column(Text(printable(column)), justify=justify, width=width, overflow="fold")
    for row in sheet.rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    if sheet.rows:
        console.print(table)
    for remark in sheet.remarks:
        console.print(Text(printable(remark)))


def _widths(sheet: Sheet, whole: int) -> list[int]:
    """Each column's width. Narrow columns get what they need, and wide ones share the rest. Figures come first.

    In a narrow terminal, words wrap then, but a figure with its interval does not.
    """
    cells = list(zip(*sheet.rows, strict=True)) or [()] * len(sheet.columns)
    lines = [[line for cell in column for line in cell.splitlines()] for column in cells]
    needed = [max(map(cell_len, ["", *column.split(), *own])) for column, own in zip(sheet.columns, lines, strict=True)]
    words, figures = range(sheet.labels), range(sheet.labels, len(sheet.columns))
    left = whole - 3 * len(sheet.columns) - 1
    widths: dict[int, int] = {}
    for group, reserved in ((figures, _LABEL_WIDTH * len(words)), (words, 0)):
        for rank, number in enumerate(sorted(group, key=needed.__getitem__)):
            fair = (left - reserved) // (len(group) - rank)
            widths[number] = max(1, min(needed[number], fair))
            left -= widths[number]
    for number in sorted(widths):
        extra = max(0, min(left, cell_len(sheet.columns[number]) - widths[number]))
        widths[number] += extra
        left -= extra
    return [widths[number] for number in sorted(widths)]


def page(title: str, sheets: Sequence[Sheet]) -> str:
    """A self-contained HTML page without scripts or requests to servers."""
    body = "\n".join(_section(sheet) for sheet in sheets)
    return (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_escaped(title)}</title>\n<style>{_STYLE}</style>\n<h1>{_escaped(title)}</h1>\n{body}\n</html>\n"
    )


def printable(text: str) -> str:
    """The text without characters that move a terminal's cursor or change colour or direction. Line breaks stay."""
    lines = text.replace("\r\n", "\n").expandtabs(4)
    return "".join(
        character if character in _KEPT or unicodedata.category(character) not in {"Cc", "Cf", "Cs"} else "\ufffd"
        for character in lines
    )


def shortened(text: str, limit: int = 80) -> str:
    """The text on one line, cut off after `limit` characters."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[:limit] + "…"


def _section(sheet: Sheet) -> str:
    head = "".join(f"<th>{_escaped(column)}</th>" for column in sheet.columns)
    rows = "\n".join(f"<tr>{_cells(sheet, row)}</tr>" for row in sheet.rows)
    table = f"<table>\n<caption>{_escaped(sheet.title)}</caption>\n<tr>{head}</tr>\n{rows}\n</table>\n"
    return (table if sheet.rows else "") + "".join(f"<p>{_escaped(remark)}</p>\n" for remark in sheet.remarks)


def _cells(sheet: Sheet, row: Sequence[str]) -> str:
    words = "".join(f"<td>{_escaped(cell)}</td>" for cell in row[1 : sheet.labels])
    figures = "".join(f'<td class="number">{_escaped(cell)}</td>' for cell in row[sheet.labels :])
    return f"<th>{_escaped(row[0])}</th>{words}{figures}"


def _escaped(text: str) -> str:
    return html.escape(printable(text))


def print_written(path: Path, console: Console) -> None:
    """Report that a file was written, with its path unwrapped so that it can be copied."""
    console.print(f"wrote {path}", markup=False, highlight=False, soft_wrap=True)


def conversation_text(conversation: Conversation) -> str:
    """A conversation as readable text: its only message, or every message after its role."""
    if len(conversation) == 1:
        return conversation[0].content
    return "\n".join(f"{message.role}: {message.content}" for message in conversation)
