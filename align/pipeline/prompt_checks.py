"""Checks a recipe's prompts against its other blocks: rows in the splits that stages read, and known categories.

Recipes are read often, so the rows are searched as text and not parsed. Hub datasets and compressed files are skipped.
"""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from align.constitution.constitution import Constitution
from align.data.paths import file_fault, is_local_path, local_files
from align.records import Split
from align.settings.data import PromptsBlock, PromptSource
from align.settings.validation import nearest

MISSPELLING_CUTOFF = 0.8
"""Similarity (difflib's ratio) from which a category that no prompt has counts as a misspelling of one that exists."""


def empty_splits(prompts: PromptsBlock, splits: Iterable[Split]) -> list[Split]:
    """The splits among these that no prompt can belong to: their share is 0, and no row names them."""
    without_share = [split for split in splits if not getattr(prompts.split, split)]
    named = _values_of("split", prompts.sources) if without_share else None
    return [split for split in without_share if named is not None and split not in named]


def misspelt_categories(constitution: Constitution, prompts: PromptsBlock) -> Iterator[str]:
    """A fault for each category that a principle applies to and no prompt has, if it resembles one of the prompts'."""
    named = {category for principle in constitution.principles for category in principle.applies}
    known = (_categories(prompts) if named else None) or set()
    for principle in constitution.principles:
        for category in principle.applies:
            meant = nearest(category, known - named, MISSPELLING_CUTOFF)
            if category not in known and meant:
                yield (
                    f"constitution: principle '{principle.id}' applies to '{category}', a category that no prompt has; "
                    f"did you mean `{meant}`?"
                )


def _categories(prompts: PromptsBlock) -> set[str] | None:
    in_rows = _values_of("category", prompts.sources)
    if in_rows is None:
        return None
    return in_rows | {source.category for source in prompts.sources if source.category}


def _values_of(key: str, sources: Iterable[PromptSource]) -> set[str] | None:
    """The texts under a key in the rows of all the sources; None if one of them is not a local, uncompressed file."""
    found: set[str] = set()
    pattern = re.compile(rb'"%s"\s*:\s*("(?:[^"\\]|\\.)*")' % key.encode())
    for source in sources:
        plain = all(path.endswith(".jsonl") and is_local_path(path) and not file_fault(path) for path in source.paths)
        if source.columns or not plain:
            return None
        for file in local_files(source):
            with Path(file).open("rb") as lines:
                found |= {_text(match) for line in lines for match in pattern.findall(line)}
    return found


def _text(quoted: bytes) -> str:
    try:
        return str(json.loads(quoted))
    except ValueError:
        return ""
