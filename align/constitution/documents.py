"""The documents that a constitution names as `sources`, split into numbered passages.

Documents are `.txt` and `.md` files, whose paragraphs are passages (in `.md` under the nearest heading above), and
`.jsonl` files, where each row's `text` is a passage. A passage's id is the file's path in the folder and the passage's
number in the file: `rivers/danube.md#3`.

Documents are not trusted: file names are restricted, links that lead out of the folder are refused, passages are short.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from align.errors import InputError
from align.figures.sentences import sentences
from align.records import digest, parse_jsonl

MAX_PASSAGE = 800
"""Characters. A longer paragraph is cut at the ends of sentences."""
MAX_FOLDER = 20_000_000
"""Bytes. Folders are limited because they are read every time that the recipe is."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_HEADING = re.compile(r"^#{1,6}[ \t]+(.*?)[ \t]*#*[ \t]*$", re.MULTILINE)


@dataclass(frozen=True)
class Passage:
    """A short piece of a document, with the id by which a critique cites it."""

    id: str
    text: str


@dataclass(frozen=True)
class Documents:
    """The texts of a folder's files, by their path in the folder."""

    folder: Path
    texts: dict[str, str]

    @property
    def digest(self) -> str:
        """SHA-256 of the files' paths in the folder and their texts; it does not depend on where the folder is."""
        return digest({name: hashlib.sha256(text.encode()).hexdigest() for name, text in self.texts.items()}, length=64)

    @cached_property
    def passages(self) -> tuple[Passage, ...]:
        """Every passage, in the order of the files.

        Raises:
            InputError: a row of a .jsonl file has no `text`.
        """
        return tuple(
            Passage(f"{name}#{number}", passage)
            for name, text in self.texts.items()
            for number, passage in enumerate(SPLITTERS[Path(name).suffix](text, str(self.folder / name)), start=1)
        )


def read_documents(folder: Path) -> Documents:
    """Read a folder and its subfolders. Files and folders whose names start with a dot are ignored.

    Raises:
        InputError: there is no such folder, it holds no text, it is too large, or one of its files is not a document.
    """
    if not os.path.isdir(folder):
        fault = "is a file" if os.path.exists(folder) else "no such folder"
        raise InputError(f"{folder}: {fault}; name a folder, relative to the constitution's own")
    found = [file for file in sorted(folder.rglob("*")) if not _is_hidden(file, folder)]
    for link in (file for file in found if file.is_symlink() and not file.is_file()):
        raise InputError(f"{link}: a link to a folder or to nothing, which is not followed; replace it with a copy")
    files = [file for file in found if file.is_file()]
    if (size := sum(file.stat().st_size for file in files)) > MAX_FOLDER:
        raise InputError(f"{folder}: {size:,} bytes of documents, the limit is {MAX_FOLDER:,}; remove some files")
    read = Documents(folder, {file.relative_to(folder).as_posix(): _text(file, folder) for file in files})
    if not read.passages:
        raise InputError(f"{folder}: no document contains text; add {', '.join(SPLITTERS)} files")
    return read


def _is_hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def _text(file: Path, folder: Path) -> str:
    if file.suffix not in SPLITTERS:
        raise InputError(f"{file}: not one of {', '.join(SPLITTERS)}; convert it, or move it out of the folder")
    for part in file.relative_to(folder).parts:
        if not _NAME.fullmatch(part):
            raise InputError(f"{str(file)!r}: its name cannot be cited; use only letters A-Z and a-z, digits and . _ -")
    if not file.resolve().is_relative_to(folder.resolve()):
        raise InputError(f"{file}: a link that leads out of the folder; replace it with a copy")
    try:
        # Some editors start a file with a byte order mark, which would hide its first heading or row.
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}); make it readable for this user") from None
    if "\0" in text:
        raise InputError(f"{file}: not text, as it contains null bytes; convert it, or move it out of the folder")
    return text


def _paragraphs(text: str, source: str) -> Iterator[str]:
    for paragraph in re.split(r"\n\s*\n", text):
        yield from _pieces(" ".join(paragraph.split()))


def _under_headings(text: str, source: str) -> Iterator[str]:
    """The paragraphs of Markdown, each after the nearest heading above it."""
    before, *parts = _HEADING.split(text)
    for heading, body in [("", before), *zip(parts[::2], parts[1::2], strict=True)]:
        for passage in _paragraphs(body, source):
            yield f"{heading}: {passage}" if heading else passage


def _rows(text: str, source: str) -> Iterator[str]:
    for number, row in enumerate(parse_jsonl(text.split("\n"), source), start=1):
        words = row.get("text")
        if not isinstance(words, str) or not words.strip():
            raise InputError(f"{source}, row {number}: has no `text`; every row needs one")
        yield from _pieces(" ".join(words.split()))


SPLITTERS: dict[str, Callable[[str, str], Iterator[str]]] = {
    ".txt": _paragraphs,
    ".md": _under_headings,
    ".jsonl": _rows,
}


def _pieces(paragraph: str) -> Iterator[str]:
    """The paragraph, cut into pieces of whole sentences if it is too long; a sentence that is too long is cut too."""
    if len(paragraph) <= MAX_PASSAGE:
        yield from filter(None, [paragraph])
        return
    piece = ""
    for sentence in sentences(paragraph):
        for part in (sentence[start : start + MAX_PASSAGE] for start in range(0, len(sentence), MAX_PASSAGE)):
            if piece and len(piece) + 1 + len(part) > MAX_PASSAGE:
                yield piece
                piece = ""
            piece = f"{piece} {part}".strip()
    yield from filter(None, [piece])
