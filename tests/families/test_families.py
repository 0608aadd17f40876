"""Every model family samples, trains and saves right, and docs/models.md says what was found."""

import re
from pathlib import Path

import pytest

from tests.families.checks import check_encoder, check_family
from tests.families.table import page
from tests.families.tiny_families import DECODERS, ENCODERS, Family

PAGE = Path("docs/models.md")


def told(family: Family) -> dict[str, str]:
    """What the committed page says of a family, by column."""
    text = PAGE.read_text(encoding="utf-8")
    columns = re.findall(r"^\| family \| `model_type` \| (.*) \|$", text, re.MULTILINE)[0].split(" | ")
    cells = re.findall(rf"^\| {re.escape(family.name)} \| `{family.model_type}` \| (.*) \|$", text, re.MULTILINE)
    reasons = dict(re.findall(r"^(\d+)\. (.*)$", text, re.MULTILINE))
    results = [
        cell if cell == "yes" else reasons[cell.removeprefix("no (").removesuffix(")")]
        for cell in cells[0].split(" | ")
    ]
    return dict(zip(columns, results, strict=True))


@pytest.mark.parametrize("family", DECODERS, ids=lambda family: family.name)
def test_a_family_can_do_what_the_page_says(family: Family, tmp_path: Path) -> None:
    assert check_family(family, tmp_path) == told(family)


@pytest.mark.parametrize("family", ENCODERS, ids=lambda family: family.name)
def test_an_encoder_scores_as_it_does_alone(family: Family, tmp_path: Path) -> None:
    check_encoder(family, tmp_path)


def test_the_page_is_what_the_table_writes() -> None:
    assert PAGE.read_text(encoding="utf-8") == page({family.name: told(family) for family in DECODERS})
