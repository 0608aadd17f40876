"""CONTRIBUTING.md names places that exist, and has a line for every room."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
ROOMS = sorted(path.name for path in (ROOT / "align").iterdir() if (path / "__init__.py").exists())
SYMBOLS = sorted(set(re.findall(r"`(\w+)` (?:in|\()\s*`([\w/]+\.py)`", TEXT)))
NAMED = sorted(set(re.findall(r"`([\w./-]+/[\w.-]+\.\w+)`", TEXT)))


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_has_its_line(room: str) -> None:
    assert len(re.findall(rf"^\| `{room}/`.* \|", TEXT, re.MULTILINE)) == 1


@pytest.mark.parametrize("place", NAMED)
def test_every_file_that_is_named_is_there(place: str) -> None:
    assert (ROOT / place).exists() or (ROOT / "align" / place).exists()


@pytest.mark.parametrize(("symbol", "place"), SYMBOLS)
def test_every_symbol_is_in_the_file_that_it_is_said_to_be_in(symbol: str, place: str) -> None:
    assert re.search(rf"\b{symbol}\b", (ROOT / "align" / place).read_text(encoding="utf-8"))


def test_symbols_are_found() -> None:
    assert ("TextFigures", "figures/text_metrics.py") in SYMBOLS
    assert len(SYMBOLS) > 5
