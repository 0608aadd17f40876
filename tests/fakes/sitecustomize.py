"""Adds the fake stages to every Python process that a test starts with this folder on its path."""

from pathlib import Path

import align.stages

align.stages.__path__.append(str(Path(__file__).parent / "stages"))
