"""What a recipe's prompts must have for its other blocks: rows in the splits that stages read, and their categories.

Found without parsing the rows, as recipes are read often: what only a hub or a packed file could tell is left alone.
"""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from align.constitution.constitution import Constitution
from align.data.sources import file_fault, is_local_path
from align.records import Split
from align.settings.blocks import PromptsBlock, PromptSource
from align.settings.yaml_files import nearest

MISSPELT = 0.8
"""Likeness (of difflib) from which a category that no prompt has is taken for a misspelling of one."""


def empty_splits(prompts: PromptsBlock, splits: Iterable[Split]) -> list[Split]:
    """Those of the splits into which no prompt can fall: their share is 0, and no row says that it belongs there."""
    without_share = [split for split in splits if not getattr(prompts.split, split)]
    said = _written(prompts.sources, "split") if without_share else None
    return [split for split in without_share if said is not None and split not in said]


def misspelt_categories(constitution: Constitution, prompts: PromptsBlock) -> Iterator[str]:
    """Faults of principles that apply to a category which no prompt has, and which is nearly one that they have."""
    named = {category for principle in constitution.principles for category in principle.applies}
    known = _categories(prompts) if named else None
    for principle in constitution.principles if known else ():
        for category in principle.applies:
            meant = nearest(category, (known or set()) - named, MISSPELT)
            if category not in (known or ()) and meant:
                yield (
                    f"constitution: principle '{principle.id}' applies to '{category}', a category that no prompt has; "
                    f"did you mean `{meant}`?"
                )


def _categories(prompts: PromptsBlock) -> set[str] | None:
    written = _written(prompts.sources, "category")
    if written is None:
        return None
    return written | {source.category for source in prompts.sources if source.category}


def _written(sources: Iterable[PromptSource], key: str) -> set[str] | None:
    """The texts under a key in all the sources; None where one of them is no plain text on this machine."""
    found: set[str] = set()
    pattern = re.compile(rb'"%s"\s*:\s*("(?:[^"\\]|\\.)*")' % key.encode())
    for source in sources:
        if not source.path.endswith(".jsonl") or not is_local_path(source.path) or file_fault(source.path):
            return None
        with Path(source.path).expanduser().open("rb") as lines:
            found |= {_text(match) for line in lines for match in pattern.findall(line)}
    return found


def _text(quoted: bytes) -> str:
    try:
        return str(json.loads(quoted))
    except ValueError:
        return ""
