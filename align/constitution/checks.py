"""What of a constitution's file no schema tells: names that name nothing, ids twice, probes that a rule contradicts.

The checks read the content as written, so that they find their faults beside those of the schema, and not after them.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from align.constitution.documents import read_documents
from align.constitution.principles import Principle
from align.constitution.rules import Rule
from align.errors import InputError, Problem
from align.settings.validation import nearest
from align.settings.yaml_files import KeyPath, Lines, key_name


@dataclass(frozen=True)
class Inherited:
    """What the parents of a constitution hold: their principles by id, and their tiers."""

    principles: Mapping[str, Principle]
    tiers: Sequence[str] = ()

    @property
    def tags(self) -> set[str]:
        return {tag for principle in self.principles.values() for tag in principle.tags}


def looks_like_a_recipe(content: Mapping[str, Any]) -> bool:
    """Whether a file that was given for a constitution has a recipe's keys and none of a constitution's own."""
    return "principles" not in content and bool({"model", "prompts", "sample", "sft", "judge"} & content.keys())


def chosen(inherited: Iterable[Principle], include: Sequence[str], exclude: Sequence[str]) -> list[Principle]:
    """The principles with one of the tags to include, where there are any, and none of those to exclude."""
    return [
        principle
        for principle in inherited
        if (not include or not set(include).isdisjoint(principle.tags)) and set(exclude).isdisjoint(principle.tags)
    ]


def file_problems(content: Mapping[str, Any], lines: Lines, folder: Path) -> Iterator[Problem]:
    """Faults that a file has by itself. `folder` is where it stands."""
    yield from _duplicate_ids(content, lines)
    yield from _equal_probes(content, lines)
    yield from _probe_problems(content, lines)
    yield from _source_problems(content, lines, folder)
    for tier, count in Counter(_texts(content.get("tiers"))).items():
        if count > 1:
            yield Problem("tiers", f"'{tier}' is there {count} times; keep one", lines.of(("tiers",)))


def reference_problems(content: Mapping[str, Any], lines: Lines, inherited: Inherited) -> Iterator[Problem]:
    """Names that name nothing, in the file or in what it inherits; and nothing to go by at all."""
    dropped = _texts(content.get("drop"))
    taken = chosen(inherited.principles.values(), _texts(content.get("include")), _texts(content.get("exclude")))
    kept = [principle for principle in taken if principle.id not in dropped]
    own = [principle.get("id") for _, principle in _items(content, "principles")]
    ids = {principle.id for principle in kept} | {name for name in own if isinstance(name, str)}
    tiers = _texts(content.get("tiers")) or inherited.tiers
    if not ids and not own:
        key = next((key for key in ("principles", "include", "exclude", "drop") if key in content), "title")
        yield Problem("principles", "a constitution needs at least one principle", lines.of((key,)))
    yield from _unknown(_listed(content, "drop"), "inherited principle", inherited.principles, lines)
    for key in ("include", "exclude"):
        yield from _unknown(_listed(content, key), "inherited tag", inherited.tags, lines)
    yield from _weight_problems(content, lines, {principle.id for principle in kept}, own)
    for key in ("examples", "comparisons"):
        yield from _unknown(_named(content, key, "principle"), "principle", ids, lines)
    yield from _tier_problems(content, lines, tiers)
    for principle in kept:
        if principle.id not in own and principle.tier is not None and principle.tier not in tiers:
            yield Problem(f"{principle.id}.tier", no_such(principle.tier, "tier", tiers), lines.of(("tiers",)))


def no_such(name: str, kind: str, known: Iterable[str]) -> str:
    """What is wrong with a name that names nothing, and the nearest one that does."""
    names = sorted(known)
    match = nearest(name, names)
    remedy = f"did you mean `{match}`?" if match else f"there are {', '.join(names) or 'none'}"
    return f"'{name}' is no {kind}; {remedy}"


Named = Iterable[tuple[KeyPath, str]]


def _unknown(named: Named, kind: str, known: Iterable[str], lines: Lines) -> Iterator[Problem]:
    for path, name in named:
        if name not in known:
            key = str(path[0]) if len(path) == 2 else key_name(path)
            yield Problem(key, no_such(name, kind, known), lines.of(path))


def _tier_problems(content: Mapping[str, Any], lines: Lines, tiers: Sequence[str]) -> Iterator[Problem]:
    for path, name in _named(content, "principles", "tier"):
        if name not in tiers:
            key = f"{_name(content, path)}.tier"
            yield Problem(key, no_such(name, "tier", tiers), lines.of(path))


def _name(content: Mapping[str, Any], path: KeyPath) -> str:
    """The id of the principle at the path, or its place in the list where it has none."""
    name = content["principles"][path[1]].get("id")
    return name if isinstance(name, str) else key_name(path[:2])


def _weight_problems(content: Mapping[str, Any], lines: Lines, kept: set[str], own: Sequence[Any]) -> Iterator[Problem]:
    weights = content.get("weights")
    for name in weights if isinstance(weights, Mapping) else ():
        path = ("weights", str(name))
        if name in own:
            fault = "is a principle of this file; write its `weight` there"
            yield Problem(key_name(path), fault, lines.of(path))
        elif name not in kept:
            yield Problem(key_name(path), no_such(str(name), "inherited principle that is kept", kept), lines.of(path))


def _duplicate_ids(content: Mapping[str, Any], lines: Lines) -> Iterator[Problem]:
    first: dict[str, KeyPath] = {}
    for index, principle in _items(content, "principles"):
        name, path = principle.get("id"), ("principles", index, "id")
        if isinstance(name, str) and first.setdefault(name, path) != path:
            fault = f"'{name}' is taken by the principle on line {lines.of(first[name])}; ids must be unique"
            yield Problem(key_name(path), fault, lines.of(path))


def _equal_probes(content: Mapping[str, Any], lines: Lines) -> Iterator[Problem]:
    """Probes of two completions that are one and the same, which no judge can tell apart."""
    for index, principle in _items(content, "principles"):
        for number, probe in _items(principle, "probes"):
            better, path = probe.get("better"), ("principles", index, "probes", number, "worse")
            if isinstance(better, str) and better == probe.get("worse"):
                fault = "is the same as `better`; give a completion that does not follow the principle"
                yield Problem(f"{_name(content, path)}: {key_name(path[2:])}", fault, lines.of(path))


def _probe_problems(content: Mapping[str, Any], lines: Lines) -> Iterator[Problem]:
    """Probes on which a principle's own rule disagrees."""
    for index, principle in _items(content, "principles"):
        try:
            rule = Rule.model_validate(principle.get("rule"))
        except ValidationError:
            continue
        for number, probe in _items(principle, "probes"):
            for key, expected in (("better", True), ("worse", False)):
                text, path = probe.get(key), ("principles", index, "probes", number, key)
                if isinstance(text, str) and rule.holds(text) != expected:
                    fault = f"must {'keep' if expected else 'break'} the principle's rule ({rule})"
                    yield Problem(f"{_name(content, path)}: {key_name(path[2:])}", fault, lines.of(path))


def _source_problems(content: Mapping[str, Any], lines: Lines, folder: Path) -> Iterator[Problem]:
    """Folders of documents that cannot be read, or that hold files of the same name, so that ids would be ambiguous."""
    yield from _folder_problems(_listed(content, "sources"), lines, folder)
    for index, principle in _items(content, "principles"):
        own = [(("principles", index, *path), name) for path, name in _listed(principle, "sources")]
        yield from _folder_problems(own, lines, folder)


def shared_source_problems(content: Mapping[str, Any], lines: Lines, inherited: Sequence[str]) -> Iterator[Problem]:
    """Folders of several parents that hold files of one name, where the file's own principles are shown them all."""
    takes_all = any(principle.get("sources") is None for _, principle in _items(content, "principles"))
    if content.get("sources") is None and takes_all:
        yield from _folder_problems([(("extends",), source) for source in inherited], lines, Path())


def _folder_problems(named: Named, lines: Lines, folder: Path) -> Iterator[Problem]:
    owners: dict[str, str] = {}
    for path, name in named:
        try:
            documents = read_documents(folder / name)
        except InputError as error:
            yield Problem(key_name(path), str(error), lines.of(path))
            continue
        for file in documents.texts:
            if (owner := owners.setdefault(file, name)) != name:
                fault = f"{name} and {owner} both hold {file}, so its ids would name two passages; rename one"
                yield Problem(key_name(path), fault, lines.of(path))


def _items(content: Mapping[str, Any], key: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The mappings of a list, with their places in it."""
    value = content.get(key)
    return ((i, item) for i, item in enumerate(value if isinstance(value, list) else ()) if isinstance(item, Mapping))


def _named(content: Mapping[str, Any], key: str, inner: str) -> Named:
    return [
        ((key, index, inner), item[inner]) for index, item in _items(content, key) if isinstance(item.get(inner), str)
    ]


def _listed(content: Mapping[str, Any], key: str) -> Named:
    """The texts of a list, or the text that stands in its place, with their paths."""
    value = content.get(key)
    if isinstance(value, str):
        return [((key,), value)]
    return [
        ((key, i), text) for i, text in enumerate(value if isinstance(value, list) else ()) if isinstance(text, str)
    ]


def _texts(value: Any) -> list[str]:
    return [text for text in value if isinstance(text, str)] if isinstance(value, list) else []
