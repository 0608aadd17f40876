"""The differences between two constitutions' content, principle by principle."""

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.constitution.constitution import Constitution

_PARTS = re.compile(r"\s+|\w+|[^\w\s]")
_COUNTED = ("probes", "examples", "comparisons")
"""Lists whose changes are counted instead of shown."""


@dataclass(frozen=True)
class Change:
    """One key that differs. `change` is 'added', 'removed', 'renamed' or 'changed'; `text` is a word diff.

    `principle` is the id, or empty for a key of the constitution itself.
    """

    change: str
    principle: str
    key: str
    text: str


def text_changes(a: Constitution, b: Constitution) -> list[Change]:
    """Everything that differs between A and B after `extends`. Principles are matched by id, then by content."""
    old, new = _dumped(a), _dumped(b)
    before, after = _principles(old), _principles(new)
    renamed = _renamed(before, after)
    changes = list(_key_changes("", _without(old, "principles", "id"), _without(new, "principles", "id")))
    for name, principle in before.items():
        if name in renamed:
            changes.append(Change("renamed", renamed[name], "id", word_diff(name, renamed[name])))
        elif name in after:
            changes += _key_changes(name, principle, after[name])
        else:
            changes.append(Change("removed", name, "text", f"[-{_instruction(principle)}-]"))
    added = (name for name in after if name not in before and name not in renamed.values())
    return [*changes, *(Change("added", name, "text", f"{{+{_instruction(after[name])}+}}") for name in added)]


def word_diff(old: str, new: str) -> str:
    """Both texts in one, with removed words as [-…-] and added words as {+…+}, as in git's word diff."""
    before, after = _PARTS.findall(old), _PARTS.findall(new)
    return "".join(_pieces(before, after))


def _pieces(before: list[str], after: list[str]) -> Iterator[str]:
    matcher = difflib.SequenceMatcher(None, before, after, autojunk=False)
    for kind, start, end, new_start, new_end in matcher.get_opcodes():
        removed, added = "".join(before[start:end]), "".join(after[new_start:new_end])
        if kind == "equal":
            yield removed
            continue
        if removed:
            yield f"[-{removed}-]"
        if added:
            yield f"{{+{added}+}}"


def _dumped(constitution: Constitution) -> dict[str, Any]:
    """The constitution's content. Documents appear by their folder's name and digest, so that paths do not matter."""
    content = _without(constitution.model_dump(mode="json"), "documents")
    content["sources"] = _source_names(constitution, constitution.sources)
    for principle, dumped in zip(constitution.principles, content["principles"], strict=True):
        dumped["sources"] = _source_names(constitution, constitution.sources_of(principle))
    return content


def _source_names(constitution: Constitution, sources: tuple[str, ...]) -> list[str]:
    return [f"{Path(each).name} {constitution.documents.get(each, '')[:8]}".strip() for each in sources]


def _principles(dumped: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {each["id"]: _without(each, "id") for each in dumped["principles"]}


def _renamed(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, str]:
    """Ids that only A has, each mapped to an id that only B has for the same principle."""
    renamed: dict[str, str] = {}
    for old in (name for name in before if name not in after):
        free = (name for name in after if name not in before and name not in renamed.values())
        if new := next((name for name in free if after[name] == before[old]), None):
            renamed[old] = new
    return renamed


def _key_changes(principle: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[Change]:
    for key in dict.fromkeys((*old, *new)):
        before, after = old.get(key), new.get(key)
        if before != after:
            counted = key in _COUNTED
            text = _count_change(before, after) if counted else word_diff(_as_text(before), _as_text(after))
            yield Change("changed", principle, key, text)


def _count_change(before: Any, after: Any) -> str:
    kept = sum(each in after for each in before)
    return f"{kept} kept, {len(before) - kept} removed, {len(after) - kept} added"


def _instruction(principle: Mapping[str, Any]) -> str:
    return str(principle["text"] or principle["critique"] or principle["compare"] or "").strip()


def _as_text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_as_text(item)}" for key, item in value.items() if item is not None)
    if isinstance(value, list | tuple):
        return " > ".join(map(_as_text, value))
    return f"{value:g}" if isinstance(value, float) else str(value).strip()


def _without(mapping: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in mapping.items() if key not in keys}
