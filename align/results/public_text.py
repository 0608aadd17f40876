"""Text and settings in the form in which the card of an exported data set may publish them.

Text from outside (constitutions, file names, what a server reports) is escaped, so that it is displayed and never
interpreted as Markdown, HTML or front matter. Server addresses and folders of this machine are removed.
"""

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

PATH_KEYS = {"path", "model", "tokenizer", "hub_folder", "harmless", "benign"}
"""Settings whose text is a path, or may be one."""

TRL_OPTIONS = "trl"
HIDDEN = "(in the manifest)"
_MARKUP = re.compile(r"([\\`*_\[\]|~$@]|:(?=//)|(?<=www)\.)", re.IGNORECASE)
"""What is markup within a line. Markup that works only at the start of a line needs no escape: no text stands there."""


def escaped(text: object) -> str:
    """Text from outside, for a line or a table cell."""
    return _MARKUP.sub(r"\\\1", html.escape(printable(" ".join(str(text).split())), quote=False))


def inline_code(text: str) -> str:
    """Text from outside, to stand between single backticks."""
    return printable(" ".join(text.split())).replace("`", "'").replace("|", "/")


def fenced(text: str, language: str = "text") -> str:
    """Text from outside as a code block, in a fence that the text cannot close."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    body = "\n".join(printable(line) for line in re.split(r"\r\n|\r|\n|\x0b|\x0c|\x85|\u2028|\u2029", text))
    return f"{fence}{language}\n{body}\n{fence}"


def printable(text: str) -> str:
    """One line of text with unprintable characters replaced."""
    return "".join(char if char.isprintable() or char == "\t" else "\ufffd" for char in text)


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown. Cells are not escaped here: escape text from outside first."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def public_path(path: str) -> str:
    """The last part of a path that leads out of the working folder; any other path unchanged."""
    parts = path.replace("\\", "/").rstrip("/").split("/")
    leads_out = path.startswith(("/", "~", "\\", "file:")) or path[1:3] in (":\\", ":/") or ".." in parts
    return parts[-1].removeprefix("file:") if leads_out else path


def public_judge(name: str) -> str:
    """A judge's name (its kind, then its engine and model) without the folders of this machine."""
    *kinds, model = name.split(":", 2)
    return ":".join((*kinds, public_path(model)))


def public_settings(value: Any, key: str = "") -> Any:
    """A setting without addresses and folders. `key` is its own key, or that of the list or options it stands in."""
    if key == "base_url":
        return value and HIDDEN
    if key == "extra" and isinstance(value, Mapping):
        return {name: each if isinstance(each, bool | int | float) else HIDDEN for name, each in value.items()}
    if key == "files" and isinstance(value, Mapping):
        return [[public_path(name), digest] for name, digest in value.items()]
    if isinstance(value, Mapping):
        return {name: public_settings(inner, key if key == TRL_OPTIONS else name) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [public_settings(each, key) for each in value]
    return public_path(value) if isinstance(value, str) and _is_path(key, value) else value


def _is_path(key: str, value: str) -> bool:
    """Whether a setting is a path. The key decides, since a prompt may begin with a slash too; among TRL's options,
    any text without spaces counts as a path."""
    return key in PATH_KEYS or (key == TRL_OPTIONS and len(value.split()) == 1)
