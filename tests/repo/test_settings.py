"""No setting is parsed and ignored: each is read somewhere."""

import importlib
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import align
from align.config import Block

SOURCE = Path(align.__file__).parent


def recipe_blocks() -> Iterator[type[Block]]:
    """Every block that a recipe is made of."""
    for module in pkgutil.walk_packages(align.__path__, "align."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    waiting = [Block]
    while waiting:
        kind = waiting.pop()
        waiting += kind.__subclasses__()
        if kind is not Block and kind.__name__.endswith("Block") and kind.__module__.startswith("align."):
            yield kind


BLOCKS = sorted(set(recipe_blocks()), key=lambda kind: kind.__name__)
TEXT = "\n".join(path.read_text(encoding="utf-8") for path in SOURCE.rglob("*.py"))
READ_BY_NAME = {"SplitBlock"}  # its shares are read by the names of the splits


@pytest.mark.parametrize("block", BLOCKS, ids=lambda kind: kind.__name__)
def test_every_key_is_read(block: type[Block]) -> None:
    unread = [name for name in block.model_fields if not re.search(rf"\.{name}\b", TEXT)]
    assert not unread or block.__name__ in READ_BY_NAME, f"{block.__name__}: {unread} are never read"
