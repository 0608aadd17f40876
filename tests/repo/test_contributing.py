"""CONTRIBUTING.md names places that exist, and has a line for every room."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
ROOMS = sorted(path.name for path in (ROOT / "align").iterdir() if (path / "__init__.py").exists())
NAMED = sorted(set(re.findall(r"`([\w./-]+/[\w.-]+\.\w+)`", TEXT)))


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_has_its_line(room: str) -> None:
    assert len(re.findall(rf"^\| `{room}/`.* \|", TEXT, re.MULTILINE)) == 1


@pytest.mark.parametrize("place", NAMED)
def test_every_file_that_is_named_is_there(place: str) -> None:
    assert (ROOT / place).exists() or (ROOT / "align" / place).exists()
