"""What differs between the texts of two constitutions, principle by principle."""

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.constitution.constitution import Constitution

_PARTS = re.compile(r"\s+|\w+|[^\w\s]")
_LISTS = ("probes", "examples", "comparisons")


@dataclass(frozen=True)
class Change:
    """One key that differs. `change` is 'added', 'removed', 'renamed' or 'changed'; `text` shows it as a word diff.

    `principle` is empty for a key of the constitution itself.
    """

    change: str
    principle: str
    key: str
    text: str


def text_changes(a: Constitution, b: Constitution) -> list[Change]:
    """Everything that differs from A to B after `extends`; principles are matched by id, then by content."""
    ours, theirs = _dumped(a), _dumped(b)
    one, other = _principles(ours), _principles(theirs)
    renamed = _renamed(one, other)
    changes = list(_key_changes("", _without(ours, "principles", "id"), _without(theirs, "principles", "id")))
    for name, principle in one.items():
        if name in renamed:
            changes.append(Change("renamed", renamed[name], "id", word_diff(name, renamed[name])))
        elif name in other:
            changes += _key_changes(name, principle, other[name])
        else:
            changes.append(Change("removed", name, "text", f"[-{_instruction(principle)}-]"))
    added = (name for name in other if name not in one and name not in renamed.values())
    return [*changes, *(Change("added", name, "text", f"{{+{_instruction(other[name])}+}}") for name in added)]


def word_diff(old: str, new: str) -> str:
    """Both texts in one, words taken away as [-…-] and words added as {+…+}, as git shows them."""
    before, after = _PARTS.findall(old), _PARTS.findall(new)
    return "".join(_pieces(before, after))


def _pieces(before: list[str], after: list[str]) -> Iterator[str]:
    matcher = difflib.SequenceMatcher(None, before, after, autojunk=False)
    for kind, start, end, new_start, new_end in matcher.get_opcodes():
        gone, come = "".join(before[start:end]), "".join(after[new_start:new_end])
        if kind == "equal":
            yield gone
            continue
        if gone:
            yield f"[-{gone}-]"
        if come:
            yield f"{{+{come}+}}"


def _dumped(constitution: Constitution) -> dict[str, Any]:
    """All that it holds, its documents by their folder's name and digest: where they lie changes nothing."""
    content = _without(constitution.model_dump(mode="json"), "documents")
    content["sources"] = _named(constitution, constitution.sources)
    for principle, dumped in zip(constitution.principles, content["principles"], strict=True):
        dumped["sources"] = _named(constitution, constitution.sources_of(principle))
    return content


def _named(constitution: Constitution, sources: tuple[str, ...]) -> list[str]:
    return [f"{Path(each).name} {constitution.documents.get(each, '')[:8]}".strip() for each in sources]


def _principles(dumped: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {each["id"]: _without(each, "id") for each in dumped["principles"]}


def _renamed(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, str]:
    """Ids that only A has, each with the id that only B has and whose principle is the same."""
    found: dict[str, str] = {}
    for name in (name for name in one if name not in other):
        twins = [twin for twin in other if twin not in one and twin not in found.values() and other[twin] == one[name]]
        if twins:
            found[name] = twins[0]
    return found


def _key_changes(principle: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[Change]:
    for key in dict.fromkeys((*old, *new)):
        before, after = old.get(key), new.get(key)
        if before != after:
            counted = key in _LISTS
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
