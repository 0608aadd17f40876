"""Loading a constitution from a YAML file and the parents that it extends, or from the Constitutional AI paper's JSON.

Every fault of the file and of its parents is reported at once, with its line.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from align.constitution.checks import Inherited, file_problems, looks_like_a_recipe, reference_problems, select_by_tags
from align.constitution.constitution import Constitution
from align.constitution.documents import read_documents
from align.constitution.paper import paper_content
from align.constitution.principles import Example, WorkedComparison
from align.constitution.schema import ConstitutionFile
from align.errors import FileProblems, InputError, Problem
from align.settings.validation import problems_from
from align.settings.yaml_files import Lines, load_yaml

Worked = TypeVar("Worked", Example, WorkedComparison)


def load_constitution(path: str | Path) -> Constitution:
    """Load a YAML file, or a folder or file of the Constitutional AI paper's JSON.

    Raises:
        InputError: there is no such file, or more than one of the file and its parents are faulty.
        FileProblems: the file, or one of its parents, is faulty; all of its faults, with their lines.
    """
    return _load(Path(path), ())


def try_load_constitution(path: str | Path) -> Constitution | None:
    """The constitution, or None if it is faulty, for callers that leave its faults to be reported elsewhere."""
    try:
        return load_constitution(path)
    except InputError:
        return None


def _load(path: Path, descendants: tuple[Path, ...]) -> Constitution:
    """Load a file. `descendants` are the resolved paths of the files that extend it, the outermost first."""
    if os.path.isdir(path) or path.suffix == ".json":
        return _load_paper(path)
    content, lines = load_yaml(path)
    if looks_like_a_recipe(content):
        raise InputError(f"{path}: this looks like a recipe, but a constitution is expected; try `align plan {path}`")
    problems = list(file_problems(content, lines, path.parent))
    parents, parent_errors = _load_parents(path, content, lines, (*descendants, path.resolve()), problems)
    inherited = _inherited(parents or [])
    if parents is not None:
        problems += reference_problems(content, lines, inherited)
    try:
        written = ConstitutionFile.model_validate(content)
    except ValidationError as error:
        problems += problems_from(error, lines, ConstitutionFile)
    errors = list(parent_errors)
    if problems:
        errors.insert(0, FileProblems(str(path), [replace(each, line=each.line or 1) for each in problems]))
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise InputError("\n".join(str(error) for error in errors))
    return _merge(path, written, inherited)


def _load_paper(path: Path) -> Constitution:
    try:
        return Constitution(id=_id_from_stem(path.resolve().stem), **paper_content(path))
    except ValidationError as error:
        raise FileProblems(str(path), problems_from(error, Lines(str(path)), Constitution)) from None


def _id_from_stem(stem: str) -> str:
    """The stem without characters that do not belong in a directory's name."""
    return re.sub(r"[^\w.-]+", "-", stem)


def _load_parents(
    path: Path, content: Mapping[str, Any], lines: Lines, descendants: tuple[Path, ...], problems: list[Problem]
) -> tuple[list[Constitution] | None, list[InputError]]:
    """The parents, or None if any of them cannot be loaded, and the errors of their files.

    Faults of `extends` itself are added to `problems`.
    """
    names = content.get("extends", [])
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return None, []
    parents, errors = [], []
    for index, name in enumerate(names):
        parent = path.parent / name
        if fault := _parent_fault(parent, name, descendants):
            problems.append(Problem("extends", fault, lines.of(("extends", index))))
            continue
        try:
            parents.append(_load(parent, descendants))
        except InputError as error:
            errors.append(error)
    return parents if len(parents) == len(names) else None, errors


def _parent_fault(parent: Path, name: str, descendants: tuple[Path, ...]) -> str:
    """Why the last descendant cannot extend this file; empty if it can."""
    if not os.path.exists(parent):
        return f"no file {name} beside {descendants[-1].name}; paths are relative to the constitution's own folder"
    if (resolved := parent.resolve()) in descendants:
        circle = " → ".join(part.name for part in (*descendants[descendants.index(resolved) :], resolved))
        return f"is circular: {circle}; remove one of them"
    return ""


def _inherited(parents: Sequence[Constitution]) -> Inherited:
    """What the parents hold together. A later parent's principle replaces an earlier one's with the same id."""
    sources: dict[Path, str] = {}
    for source in (source for parent in parents for source in parent.sources):
        sources.setdefault(Path(source).resolve(), source)
    return Inherited(
        principles={principle.id: principle for parent in parents for principle in parent.principles},
        tiers=tuple(dict.fromkeys(tier for parent in parents for tier in parent.tiers)),
        sources=tuple(sources.values()),
        examples=tuple(each for parent in parents for each in parent.examples),
        comparisons=tuple(each for parent in parents for each in parent.comparisons),
    )


def _merge(path: Path, written: ConstitutionFile, inherited: Inherited) -> Constitution:
    """The child's own content over what it inherits; its principles replace inherited ones with the same id."""
    kept = [
        principle.model_copy(update={"weight": written.weights.get(principle.id, principle.weight)})
        for principle in select_by_tags(inherited.principles.values(), written.include, written.exclude)
        if principle.id not in written.drop
    ]
    sources = inherited.sources if written.sources is None else _paths(path, written.sources)
    own = [
        principle.model_copy(
            update={
                "language": principle.language or written.language,
                "sources": sources if principle.sources is None else _paths(path, principle.sources),
            }
        )
        for principle in written.principles
    ]
    principles = {principle.id: principle for principle in (*kept, *own)}
    used = {source for principle in principles.values() for source in principle.sources or ()}
    return Constitution(
        id=_id_from_stem(path.stem),
        title=written.title,
        version=written.version,
        licence=written.licence,
        source=written.source,
        language=written.language,
        preamble=written.preamble,
        tiers=written.tiers or tuple(inherited.tiers),
        passages=written.passages,
        principles=tuple(principles.values()),
        examples=written.examples or tuple(_about(principles, inherited.examples)),
        comparisons=written.comparisons or tuple(_about(principles, inherited.comparisons)),
        sources=sources,
        documents={source: read_documents(Path(source)).digest for source in sorted(used)},
    )


def _paths(path: Path, folders: Iterable[str]) -> tuple[str, ...]:
    """Folders named in the file at `path`, as paths that can be opened from the working directory."""
    return tuple(str(path.parent / folder) for folder in folders)


def _about(principles: Iterable[str], worked: Iterable[Worked]) -> Iterator[Worked]:
    """The worked examples for one of these principles, or for any."""
    ids = {None, *principles}
    return (each for each in worked if each.principle in ids)
