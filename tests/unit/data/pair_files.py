"""Files of preference pairs, for tests."""

import json
from pathlib import Path
from typing import Any

from align.data.pairs import read_pairs
from align.records import PreferencePair
from align.settings.data import PairSource


def write(path: Path, *rows: Any) -> PairSource:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return PairSource(path=str(path))


def one(source: PairSource) -> PreferencePair:
    (pair,) = read_pairs(source)
    return pair
