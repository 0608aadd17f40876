"""Constitutions: the principles that steer a run, read from one YAML file (or the Constitutional AI paper's own JSON).

The format is `ConstitutionFile`, whose principles are `Principle`s. A constitution's identity is a digest of its
content after `extends`: comments and the order of keys don't change it, one letter of a text does.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ConfigDict, Field, ValidationError

from align.constitution.checks import (
    Inherited,
    chosen,
    file_problems,
    looks_like_a_recipe,
    reference_problems,
    shared_source_problems,
)
from align.constitution.documents import read_documents
from align.constitution.paper import paper_content
from align.constitution.principles import Example, Id, Language, Principle, Probe, Text, Texts, Turn, WorkedComparison
from align.errors import FileProblems, InputError, Problem
from align.records import digest
from align.run.reproducibility import derive_seed
from align.settings.blocks import AboveZero, Block, Positive
from align.settings.validation import problems_from
from align.settings.yaml_files import Lines, load_yaml

__all__ = [
    "Constitution",
    "ConstitutionFile",
    "Example",
    "Principle",
    "Probe",
    "Turn",
    "WorkedComparison",
    "constitution_key",
    "draw_principle",
    "load_constitution",
    "sound_constitution",
]


class _Content(Block):
    """What a constitution holds, before and after `extends`."""

    title: Text = Field(description="what it is called")
    version: Text = Field("1", description="of the file, in quotes")
    licence: str = Field("", description="under which it may be used")
    source: str = Field("", description="where it comes from")
    language: Language = Field("en", description="of its texts, such as en or ja")
    preamble: str | None = Field(None, description="why; for the reader")
    tiers: tuple[Text, ...] = Field((), description="names of tiers, the one that decides first in front")
    passages: Positive = Field(3, description="how many passages of `sources` are shown at most")
    principles: tuple[Principle, ...] = Field((), description="what completions are revised and judged by")
    examples: tuple[Example, ...] = Field((), description="worked critiques and revisions")
    comparisons: tuple[WorkedComparison, ...] = Field((), description="worked choices")


class ConstitutionFile(_Content):
    """A constitution as written."""

    model_config = ConfigDict(
        json_schema_extra={
            "anyOf": [
                {"required": ["principles"], "properties": {"principles": {"minItems": 1}}},
                {"required": ["extends"]},
            ]
        }
    )

    extends: Texts = Field((), description="files that it begins from, relative to its own folder")
    include: tuple[Text, ...] = Field(
        (), description="tags: of what is inherited, take what has one of these; all if empty"
    )
    exclude: tuple[Text, ...] = Field((), description="tags: of what is inherited, leave out what has one of these")
    drop: tuple[Id, ...] = Field((), description="ids of inherited principles to leave out")
    weights: Mapping[Id, AboveZero] = Field(
        {},
        description="other weights for inherited principles, by id",
        json_schema_extra={"additionalProperties": False},
    )
    sources: Texts | None = Field(None, description="folders of documents, relative to the constitution's own")


class Constitution(_Content):
    """A constitution after `extends`: at least one principle, ids unique. `id` is the file's stem.

    Every principle says its language and its sources, which are paths from here; `documents` has the digest of each.
    """

    id: str
    sources: tuple[str, ...] = ()
    documents: dict[str, str] = Field(default_factory=dict)

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical content, without the id: what is the default is not in it, nor where files stand."""
        return digest(self._canonical(), length=64)

    def _canonical(self) -> dict[str, Any]:
        content = self.model_dump(mode="json", exclude={"id", "sources", "documents"}, exclude_defaults=True)
        for principle, written in zip(self.principles, content.get("principles", ()), strict=True):
            if written.get("language") == self.language:
                del written["language"]
            written.pop("sources", None)
            if sources := self.sources_of(principle):
                written["sources"] = [self.documents.get(source, source) for source in sources]
        return content

    @property
    def key(self) -> str:
        """Names the constitution's run directories."""
        return f"{self.id}-{self.digest[:8]}"

    def principle(self, principle_id: str) -> Principle:
        """The principle of this id.

        Raises:
            KeyError: there is none.
        """
        return {principle.id: principle for principle in self.principles}[principle_id]

    def rank(self, principle: Principle) -> int:
        """How early a principle decides a conflict: hard ones first, then tier by tier, then those of no tier."""
        if principle.hard:
            return -1
        return self.tiers.index(principle.tier) if principle.tier in self.tiers else len(self.tiers)

    def sources_of(self, principle: Principle) -> tuple[str, ...]:
        """The folders whose passages are shown with the principle."""
        return self.sources if principle.sources is None else principle.sources

    def without_folders(self) -> "Constitution":
        """The constitution with the digests of its documents in the place of their folders; its own digest stays."""
        principles = tuple(
            principle.model_copy(update={"sources": self._digests_of(principle.sources)})
            for principle in self.principles
        )
        documents = {each: each for each in self.documents.values()}
        return self.model_copy(
            update={"sources": self._digests_of(self.sources), "principles": principles, "documents": documents}
        )

    def _digests_of(self, sources: tuple[str, ...] | None) -> tuple[str, ...] | None:
        """What no principle shows has not been read, and is left out."""
        return None if sources is None else tuple(self.documents[each] for each in sources if each in self.documents)

    @cached_property
    def worked_examples(self) -> tuple[Example, ...]:
        """Every worked critique and revision: the constitution's, then those inside its principles."""
        own = (
            Example(**dict(example), principle=principle.id)
            for principle in self.principles
            for example in principle.examples
        )
        return *self.examples, *own

    @cached_property
    def worked_comparisons(self) -> tuple[WorkedComparison, ...]:
        """Every worked choice: the constitution's, then those inside its principles."""
        own = (
            WorkedComparison(**dict(comparison), principle=principle.id)
            for principle in self.principles
            for comparison in principle.comparisons
        )
        return *self.comparisons, *own


def load_constitution(path: str | Path) -> Constitution:
    """The constitution of a YAML file, or of a folder or file of the Constitutional AI paper's JSON.

    Raises:
        InputError: no such file.
        FileProblems: every fault of the file, with lines.
    """
    return _load(Path(path), ())


def sound_constitution(path: str | Path) -> Constitution | None:
    """`load_constitution`; None where it has faults, which are told elsewhere, for checks of what depends on it."""
    try:
        return load_constitution(path)
    except InputError:
        return None


def constitution_key(path: str | Path) -> str:
    """`load_constitution(path).key`."""
    return load_constitution(path).key


def draw_principle(
    principles: Sequence[Principle], seed: int, *names: str | int, category: str = ""
) -> Principle | None:
    """One of the principles that apply to the category, drawn in proportion to the weights; None where none applies.

    The draw depends on seed and names alone: another `names` is an independent draw.
    """
    applying = [principle for principle in principles if principle.applies_to(category)]
    point = derive_seed(seed, *names) / 2**63 * sum(principle.weight for principle in applying)
    for principle in applying:
        point -= principle.weight
        if point < 0:
            return principle
    return applying[-1] if applying else None


def _load(path: Path, below: tuple[Path, ...]) -> Constitution:
    if path.is_dir() or path.suffix == ".json":
        return _from_paper(path)
    content, lines = load_yaml(path)
    if looks_like_a_recipe(content):
        raise InputError(f"{path}: this looks like a recipe, and a constitution is expected; see `align plan {path}`")
    problems = list(file_problems(content, lines, path.parent))
    parents, unread = _parents(path, content, lines, (*below, path.resolve()), problems)
    if parents is not None:
        problems += reference_problems(content, lines, _inherited(parents))
        problems += shared_source_problems(content, lines, _inherited_sources(parents))
    try:
        written = ConstitutionFile.model_validate(content)
    except ValidationError as error:
        problems += problems_from(error, lines, ConstitutionFile)
    if problems:
        unread.insert(0, FileProblems(str(path), [replace(each, line=each.line or 1) for each in problems]))
    if len(unread) == 1:
        raise unread[0]
    if unread:
        raise InputError("\n".join(str(error) for error in unread))
    return _merged(path, written, parents or [])


def _from_paper(path: Path) -> Constitution:
    try:
        return Constitution(id=_safe(path.resolve().stem), **paper_content(path))
    except ValidationError as error:
        raise FileProblems(str(path), problems_from(error, Lines(str(path)), Constitution)) from None


def _safe(stem: str) -> str:
    """The stem as part of a directory's name."""
    return re.sub(r"[^\w.-]+", "-", stem)


def _parents(
    path: Path, content: Mapping[str, Any], lines: Lines, below: tuple[Path, ...], problems: list[Problem]
) -> tuple[list[Constitution] | None, list[InputError]]:
    """The parents, None unless every one could be read; and the faults of their own files.

    What is wrong with `extends` itself is added to `problems`.
    """
    names = content.get("extends", [])
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return None, []
    parents, faults = [], []
    for index, name in enumerate(names):
        parent = path.parent / name
        if fault := _not_a_parent(parent, name, below):
            problems.append(Problem("extends", fault, lines.of(("extends", index))))
            continue
        try:
            parents.append(_load(parent, below))
        except InputError as error:
            faults.append(error)
    return parents if len(parents) == len(names) else None, faults


def _not_a_parent(parent: Path, name: str, below: tuple[Path, ...]) -> str:
    """Why a constitution cannot extend this one; empty where it can."""
    if not parent.exists():
        return f"no file {name} beside {below[-1].name}; paths are relative to the constitution's own folder"
    if (resolved := parent.resolve()) in below:
        chain = " → ".join(part.name for part in (*below[below.index(resolved) :], resolved))
        return f"goes round in a circle: {chain}"
    return ""


def _inherited(parents: Sequence[Constitution]) -> Inherited:
    """What parents hold together: of principles with the same id, and of tiers named twice, one each."""
    principles = {principle.id: principle for parent in parents for principle in parent.principles}
    return Inherited(principles, tuple(dict.fromkeys(tier for parent in parents for tier in parent.tiers)))


def _merged(path: Path, written: ConstitutionFile, parents: Sequence[Constitution]) -> Constitution:
    """The child's own words where it has them; principles by id, a child's in the place of its parent's."""
    inherited = _inherited(parents)
    taken = chosen(inherited.principles.values(), written.include, written.exclude)
    kept = [
        principle.model_copy(update={"weight": written.weights.get(principle.id, principle.weight)})
        for principle in taken
        if principle.id not in written.drop
    ]
    sources = _sources(path, written, parents)
    own = [_resolved(principle, path.parent, written.language, sources) for principle in written.principles]
    principles = {principle.id: principle for principle in (*kept, *own)}
    named = {source for principle in principles.values() for source in principle.sources or ()}
    return Constitution(
        id=_safe(path.stem),
        title=written.title,
        version=written.version,
        licence=written.licence,
        source=written.source,
        language=written.language,
        preamble=written.preamble,
        tiers=written.tiers or tuple(inherited.tiers),
        passages=written.passages,
        principles=tuple(principles.values()),
        examples=written.examples or tuple(_kept(principles, (each.examples for each in parents))),
        comparisons=written.comparisons or tuple(_kept(principles, (each.comparisons for each in parents))),
        sources=sources,
        documents={source: read_documents(Path(source)).digest for source in sorted(named)},
    )


def _sources(path: Path, written: ConstitutionFile, parents: Sequence[Constitution]) -> tuple[str, ...]:
    """The constitution's folders, as paths from here: its own, or those of its parents where it names none."""
    if written.sources is not None:
        return tuple(str(path.parent / name) for name in written.sources)
    return _inherited_sources(parents)


def _inherited_sources(parents: Sequence[Constitution]) -> tuple[str, ...]:
    """The parents' folders, each once, however they spell it."""
    sources: dict[Path, str] = {}
    for source in (source for parent in parents for source in parent.sources):
        sources.setdefault(Path(source).resolve(), source)
    return tuple(sources.values())


def _resolved(principle: Principle, folder: Path, language: str, sources: tuple[str, ...]) -> Principle:
    """The principle with what it takes from its constitution: a child may have another language and other sources."""
    if principle.sources is not None:
        sources = tuple(str(folder / name) for name in principle.sources)
    return principle.model_copy(update={"language": principle.language or language, "sources": sources})


Worked = TypeVar("Worked", Example, WorkedComparison)


def _kept(principles: Iterable[str], worked: Iterable[tuple[Worked, ...]]) -> Iterator[Worked]:
    kept = {None, *principles}
    return (each for some in worked for each in some if each.principle in kept)
