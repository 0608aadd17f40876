"""Checks on a constitution's file that its schema cannot make: unknown names, repeated ids, probes that break a rule.

They read the content as written, before it is validated, so that their faults are reported together with the schema's.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from align.constitution.documents import read_documents
from align.constitution.principles import Example, Principle, WorkedComparison
from align.constitution.rules import Rule
from align.errors import InputError, Problem
from align.settings.validation import nearest
from align.settings.yaml_files import KeyPath, Lines, key_name

NamedKeys = Iterable[tuple[KeyPath, str]]
"""Names in a file, each with the path of the key that holds it."""


@dataclass(frozen=True)
class Inherited:
    """What the parents of a constitution hold together: principles by id, tiers, folders and worked examples."""

    principles: Mapping[str, Principle]
    tiers: Sequence[str]
    sources: tuple[str, ...]
    examples: Sequence[Example]
    comparisons: Sequence[WorkedComparison]

    @property
    def tags(self) -> set[str]:
        return {tag for principle in self.principles.values() for tag in principle.tags}


def looks_like_a_recipe(content: Mapping[str, Any]) -> bool:
    """Whether the file has keys of a recipe and no principles."""
    return "principles" not in content and bool({"model", "prompts", "sample", "sft", "judge"} & content.keys())


def select_by_tags(principles: Iterable[Principle], include: Sequence[str], exclude: Sequence[str]) -> list[Principle]:
    """The principles that have a tag of `include` (any principle if it is empty) and no tag of `exclude`."""
    return [
        principle
        for principle in principles
        if (not include or not set(include).isdisjoint(principle.tags)) and set(exclude).isdisjoint(principle.tags)
    ]


def file_problems(content: Mapping[str, Any], lines: Lines, folder: Path) -> Iterator[Problem]:
    """Faults of the file itself, whatever its parents hold. `folder` is the file's own."""
    yield from _duplicate_ids(content, lines)
    yield from _equal_probes(content, lines)
    yield from _probe_problems(content, lines)
    yield from _folder_problems(_strings(content, "sources"), lines, folder)
    for index, principle in _mappings(content, "principles"):
        own = [(("principles", index, *path), name) for path, name in _strings(principle, "sources")]
        yield from _folder_problems(own, lines, folder)
    for tier, count in Counter(_string_items(content.get("tiers"))).items():
        if count > 1:
            yield Problem("tiers", f"'{tier}' is listed {count} times; keep one", lines.of(("tiers",)))


def reference_problems(content: Mapping[str, Any], lines: Lines, inherited: Inherited) -> Iterator[Problem]:
    """Faults in what the file and its parents hold together: unknown names, no principle, ambiguous documents."""
    dropped, include, exclude = (_string_items(content.get(key)) for key in ("drop", "include", "exclude"))
    selected = select_by_tags(inherited.principles.values(), include, exclude)
    kept = [principle for principle in selected if principle.id not in dropped]
    own = [principle.get("id") for _, principle in _mappings(content, "principles")]
    ids = {principle.id for principle in kept} | {name for name in own if isinstance(name, str)}
    tiers = _string_items(content.get("tiers")) or inherited.tiers
    if not ids and not own:
        key = next((key for key in ("principles", "include", "exclude", "drop") if key in content), "title")
        yield Problem("principles", "a constitution needs at least one principle", lines.of((key,)))
    yield from _unknown_names(_strings(content, "drop"), "inherited principle", inherited.principles, lines)
    for key in ("include", "exclude"):
        yield from _unknown_names(_strings(content, key), "inherited tag", inherited.tags, lines)
    yield from _weight_problems(content, lines, {principle.id for principle in kept}, own)
    for key in ("examples", "comparisons"):
        yield from _unknown_names(_inner_strings(content, key, "principle"), "principle", ids, lines)
    for path, tier in _inner_strings(content, "principles", "tier"):
        if tier not in tiers:
            yield Problem(f"{_label(content, path)}.tier", _unknown(tier, "tier", tiers), lines.of(path))
    for principle in kept:
        if principle.id not in own and principle.tier is not None and principle.tier not in tiers:
            yield Problem(f"{principle.id}.tier", _unknown(principle.tier, "tier", tiers), lines.of(("tiers",)))
    uses_inherited_sources = any(principle.get("sources") is None for _, principle in _mappings(content, "principles"))
    if content.get("sources") is None and uses_inherited_sources:
        yield from _folder_problems([(("extends",), source) for source in inherited.sources], lines, Path())


def _unknown(name: str, kind: str, known: Iterable[str]) -> str:
    """The fault of a name that refers to nothing, with the nearest known name as the remedy."""
    names = sorted(known)
    match = nearest(name, names)
    remedy = f"did you mean `{match}`?" if match else f"the names are {', '.join(names)}" if names else "there are none"
    return f"no {kind} is named '{name}'; {remedy}"


def _unknown_names(named: NamedKeys, kind: str, known: Iterable[str], lines: Lines) -> Iterator[Problem]:
    for path, name in named:
        if name not in known:
            key = str(path[0]) if len(path) == 2 else key_name(path)
            yield Problem(key, _unknown(name, kind, known), lines.of(path))


def _label(content: Mapping[str, Any], path: KeyPath) -> str:
    """The id of the principle that the path leads into, or its position in the list if it has no id."""
    name = content["principles"][path[1]].get("id")
    return name if isinstance(name, str) else key_name(path[:2])


def _weight_problems(content: Mapping[str, Any], lines: Lines, kept: set[str], own: Sequence[Any]) -> Iterator[Problem]:
    weights = content.get("weights")
    for name in weights if isinstance(weights, Mapping) else ():
        path = ("weights", str(name))
        if name in own:
            fault = "this file defines the principle; set its `weight` there"
            yield Problem(key_name(path), fault, lines.of(path))
        elif name not in kept:
            yield Problem(key_name(path), _unknown(str(name), "inherited and kept principle", kept), lines.of(path))


def _duplicate_ids(content: Mapping[str, Any], lines: Lines) -> Iterator[Problem]:
    first: dict[str, KeyPath] = {}
    for path, name in _inner_strings(content, "principles", "id"):
        if first.setdefault(name, path) != path:
            fault = f"'{name}' is already the id of the principle on line {lines.of(first[name])}; ids must be unique"
            yield Problem(key_name(path), fault, lines.of(path))


def _equal_probes(content: Mapping[str, Any], lines: Lines) -> Iterator[Problem]:
    """Probes whose two completions are the same, so that no judge can tell them apart."""
    for index, principle in _mappings(content, "principles"):
        for number, probe in _mappings(principle, "probes"):
            better, path = probe.get("better"), ("principles", index, "probes", number, "worse")
            if isinstance(better, str) and better == probe.get("worse"):
                fault = "is the same as `better`; give a completion that does not follow the principle"
                yield Problem(f"{_label(content, path)}: {key_name(path[2:])}", fault, lines.of(path))


def _probe_problems(content: Mapping[str, Any], lines: Lines) -> Iterator[Problem]:
    """Probes that contradict their principle's own rule."""
    for index, principle in _mappings(content, "principles"):
        try:
            rule = Rule.model_validate(principle.get("rule"))
        except ValidationError:
            continue
        for number, probe in _mappings(principle, "probes"):
            for key, expected in (("better", True), ("worse", False)):
                text, path = probe.get(key), ("principles", index, "probes", number, key)
                if isinstance(text, str) and rule.holds(text) != expected:
                    fault = f"must {'keep' if expected else 'break'} the principle's rule ({rule})"
                    yield Problem(f"{_label(content, path)}: {key_name(path[2:])}", fault, lines.of(path))


def _folder_problems(named: NamedKeys, lines: Lines, folder: Path) -> Iterator[Problem]:
    """Folders of documents that cannot be read, or that hold files of the same name, whose ids would be ambiguous."""
    owners: dict[str, str] = {}
    for path, name in named:
        try:
            documents = read_documents(folder / name)
        except InputError as error:
            yield Problem(key_name(path), str(error), lines.of(path))
            continue
        for file in documents.texts:
            if (owner := owners.setdefault(file, name)) != name:
                fault = f"{name} and {owner} both hold {file}, so that its passages' ids are ambiguous; rename one file"
                yield Problem(key_name(path), fault, lines.of(path))


def _mappings(content: Mapping[str, Any], key: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The mappings in the list at `key`, with their positions."""
    value = content.get(key)
    return ((i, item) for i, item in enumerate(value if isinstance(value, list) else ()) if isinstance(item, Mapping))


def _inner_strings(content: Mapping[str, Any], key: str, inner: str) -> NamedKeys:
    """The texts at `inner` in the mappings of the list at `key`, with their paths."""
    return [
        ((key, index, inner), item[inner])
        for index, item in _mappings(content, key)
        if isinstance(item.get(inner), str)
    ]


def _strings(content: Mapping[str, Any], key: str) -> NamedKeys:
    """The texts of the list at `key`, or the single text there, with their paths."""
    value = content.get(key)
    if isinstance(value, str):
        return [((key,), value)]
    return [
        ((key, i), text) for i, text in enumerate(value if isinstance(value, list) else ()) if isinstance(text, str)
    ]


def _string_items(value: Any) -> list[str]:
    return [text for text in value if isinstance(text, str)] if isinstance(value, list) else []
