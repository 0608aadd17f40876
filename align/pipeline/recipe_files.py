"""Reads a recipe as it is written: its file, its parent and the overrides are merged, and each key keeps its place."""

import copy
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from align.errors import FileProblems, InputError, Problem
from align.settings.validation import MISSING
from align.settings.yaml_files import KeyPath, Lines, key_name, load_yaml_with_duplicates, yaml_value

MAX_SHOWN = 120
"""Characters of a faulty override that its error repeats."""

LACKING = "this recipe lacks"
"""In the fault of a stage or block that is not there."""


@dataclass(frozen=True)
class RawRecipe:
    """The merged content of a recipe, not validated yet.

    `files` holds the lines of the recipe's own file, then those of its parent. `overridden` holds the keys that `--set`
    gave, `errors` the faults found while reading. A recipe is `orphaned` if its parent could not be read; keys that
    seem missing may then be the parent's. `nulled` holds the keys that had a value which null replaced. `parent` is the
    parent by itself, and `inherited` the problems that it has by itself, by key and fault.
    """

    content: dict[str, Any]
    files: tuple[Lines, ...]
    overridden: tuple[KeyPath, ...]
    errors: tuple[InputError, ...] = ()
    orphaned: bool = False
    nulled: tuple[KeyPath, ...] = ()
    parent: "RawRecipe | None" = None
    inherited: dict[tuple[str, str], Problem] = field(default_factory=dict)

    def place_in_parent(self, problems: Sequence[Problem]) -> None:
        """Report those of the recipe's problems that its parent has by itself with the parent's file and line.

        What the parent lacks is no fault of the parent: it may leave that to the recipes that extend it.
        """
        faults = (each for each in problems if each.fault != MISSING and LACKING not in each.fault)
        self.inherited.update({(each.key, each.fault): each for each in faults})

    @cached_property
    def lines(self) -> Lines:
        """The line of every key, in whichever file it is; 0 if an override gave it."""
        owners = ((path, self._owner(path)) for path in _paths(self.content))
        return Lines(self.files[0].source, {path: owner.of(path) or 0 if owner else 0 for path, owner in owners})

    def problem(self, path: KeyPath, fault: str) -> Problem:
        """A problem with one key, with its line."""
        return Problem(key_name(path), fault, self.lines.of(path) or None)

    def raise_all(self, problems: Sequence[Problem], others: Sequence[InputError] = ()) -> None:
        """Raise all faults as one error, grouped by file. Returns if there is none."""
        by_source: dict[str, list[Problem]] = {lines.source: [] for lines in self.files}
        others = [*others]
        for error in self.errors:
            if isinstance(error, FileProblems) and error.source in by_source:
                by_source[error.source] += error.problems
            else:
                others.append(error)
        for problem in problems:
            source, placed = self._placed(problem)
            by_source[source].append(placed)
        errors = [*(FileProblems(source, found) for source, found in by_source.items() if found), *others]
        if len(errors) == 1:
            raise errors[0]
        if errors:
            raise InputError("\n".join(str(error) for error in errors))

    def _placed(self, problem: Problem) -> tuple[str, Problem]:
        """The file that a problem belongs to, and the problem as it is reported for that file."""
        path = tuple(re.findall(r"[^.\[\]]+", problem.key))
        owner = self._owner(path)
        if owner is None:
            return self.files[0].source, Problem(f"--set {problem.key}", problem.fault)
        if problem.fault and (problem.key, problem.fault) in self.inherited:
            return self.files[1].source, self.inherited[problem.key, problem.fault]
        return owner.source, Problem(problem.key, problem.fault, problem.line or None)

    def _owner(self, path: Sequence[str | int]) -> Lines | None:
        """The file that holds a key, or its nearest enclosing key; None if an override gave it."""
        names = [str(part) for part in path]
        if any([str(name) for name in key] == names[: len(key)] for key in self.overridden):
            return None
        for length in range(len(names), 0, -1):
            part = names[:length]
            for lines in self.files:
                if part in lines:
                    return lines
            if any([str(name) for name in key[:length]] == part for key in self.overridden):
                return None
        return self.files[0]


def read_raw_recipe(path: Path, overrides: Sequence[str]) -> RawRecipe:
    """Read a recipe's file, its parent's file if it has one, and the overrides.

    Raises:
        InputError: the file is missing or is not YAML. Other faults are kept in `errors`, to be reported with those of
            the content.
    """
    content, lines, duplicates = load_yaml_with_duplicates(path)
    files, errors = [lines], _as_errors(lines, duplicates)
    orphaned, nulled, alone = False, [], None
    if (parent := content.get("extends")) is not None:
        try:
            inherited, parent_lines, duplicates = _read_parent(path, parent, lines)
            nulled = list(_nulled(inherited, content))
            alone = RawRecipe(copy.deepcopy(inherited), (parent_lines,), ())
            content = _merged(inherited, content)
            files.append(parent_lines)
            errors += _as_errors(parent_lines, duplicates)
        except InputError as error:
            errors.append(error)
            orphaned = True
    overridden = []
    for override in overrides:
        try:
            key = apply_override(content, override)
            overridden.append(key)
            if _value_at(content, key) is None:
                nulled.append(key)
        except ValueError as error:
            errors += _as_errors(lines, [Problem(f"--set {override[:MAX_SHOWN]}", str(error))])
    return RawRecipe(content, tuple(files), tuple(overridden), tuple(errors), orphaned, tuple(nulled), alone)


def _as_errors(lines: Lines, problems: Sequence[Problem]) -> list[InputError]:
    return [FileProblems(lines.source, problems)] if problems else []


def _read_parent(path: Path, name: Any, lines: Lines) -> tuple[dict[str, Any], Lines, list[Problem]]:
    """The parent's content, lines and duplicate keys. The content omits its `name`, which is not inherited."""
    line = lines.of(("extends",))
    parent = path.parent / str(name)
    if not os.path.isfile(parent):
        fault = f"no such file {parent}; the path is relative to the recipe's own folder"
        raise FileProblems(str(path), [Problem("extends", fault, line)])
    content, parent_lines, duplicates = load_yaml_with_duplicates(parent)
    if content.get("extends") is not None:
        fault = f"{parent} itself extends another recipe; name one that extends none"
        raise FileProblems(str(path), [Problem("extends", fault, line)])
    content.pop("name", None)
    return content, parent_lines, duplicates


def _merged(parent: Mapping[str, Any], child: Mapping[str, Any]) -> dict[str, Any]:
    """Blocks are merged key by key; for everything else the child's value, if it has one, replaces the parent's."""
    both = {
        key: _merged(parent[key], child[key])
        for key in child
        if isinstance(parent.get(key), Mapping) and isinstance(child[key], Mapping)
    }
    return {**parent, **child, **both}


def _nulled(parent: Mapping[str, Any], child: Mapping[str, Any], above: KeyPath = ()) -> Iterator[KeyPath]:
    """The keys whose value in the parent the child replaces by null."""
    for key, value in child.items():
        if value is None and parent.get(key) is not None:
            yield (*above, key)
        elif isinstance(value, Mapping) and isinstance(parent.get(key), Mapping):
            yield from _nulled(parent[key], value, (*above, key))


def _value_at(content: Any, path: KeyPath) -> Any:
    for part in path:
        content = content[part] if isinstance(content, dict) else content[int(part)]
    return content


def apply_override(content: dict[str, Any], override: str) -> KeyPath:
    """Apply an override to the content, and return its key. `sources[0]` and `sources.0` name the same key.

    Raises:
        ValueError: the override is not valid; the message says why.
    """
    key, equals, text = override.partition("=")
    parts = re.sub(r"\[(\d+)\]", r".\1", key.strip()).split(".")
    if not equals or not all(parts):
        raise ValueError("expected key=value, such as ppo.kl_coef=0.1")
    if "[]" in key:
        raise ValueError(f"give the index of the list's entry, such as {key.strip().replace('[]', '[0]')}")
    value = yaml_value(text)
    place: Any = content
    for depth, part in enumerate(parts[:-1], start=1):
        if isinstance(place, dict) and place.get(part) is None:
            place[part] = {}
        place = place[_index(place, part, parts[:depth])]
    place[_index(place, parts[-1], parts)] = value
    return tuple(parts)


def _index(place: Any, part: str, path: Sequence[str]) -> str | int:
    """`part` as a key if `place` is a block, or as an index if it is a list."""
    if isinstance(place, dict):
        return part
    if isinstance(place, list) and part.isdigit() and int(part) < len(place):
        return int(part)
    above = ".".join(path[:-1])
    kind = f"a list of {len(place)}" if isinstance(place, list) else "a single value"
    raise ValueError(f"`{above}` is {kind}, so there is no `{'.'.join(path)}`")


def _paths(value: Any, above: KeyPath = ()) -> Iterator[KeyPath]:
    """The paths of all keys and list entries."""
    items: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*above, key)
        yield from _paths(inner, (*above, key))
