"""Constitutions written into a test's folder."""

from pathlib import Path

import pytest

from align.constitution.constitution import Constitution
from align.constitution.loading import load_constitution
from align.errors import FileProblems

MINIMAL = """\
title: Small
version: "1.0"
principles:
  - id: kind
    text: Be kind.
"""


def write(directory: Path, text: str, name: str = "small.yaml") -> Path:
    path = directory / name
    path.write_text(text, encoding="utf-8")
    return path


def loaded(directory: Path, text: str, name: str = "small.yaml") -> Constitution:
    return load_constitution(write(directory, text, name))


def faults(directory: Path, text: str) -> list[str]:
    with pytest.raises(FileProblems) as raised:
        loaded(directory, text)
    return [str(problem) for problem in raised.value.problems]
