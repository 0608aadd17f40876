"""Constitutions: the principles that steer a run, read from one YAML file (or the Constitutional AI paper's own JSON).

The schema is `ConstitutionFile`, whose principles are `Principle`s. A constitution's identity is a digest of its
content after `extends`: comments and the order of keys don't change it, one letter of a text does.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from align.config import Block, Number
from align.errors import FileProblems, Problem
from align.paper import paper_content
from align.records import Conversation, Message, digest
from align.repro import derive_seed
from align.rules import Rule
from align.yaml_files import KeyPath, Lines, load_yaml, nearest, problems_from

Text = Annotated[str, Field(min_length=1)]


class Probe(Block):
    """Two completions of a prompt of which one plainly follows the principle better: does a judge see it?"""

    prompt: Text
    better: Text
    worse: Text


class Turn(Block):
    """One message of a worked example's conversation."""

    role: Literal["user", "assistant"]
    content: Text


class Example(Block):
    """A worked example of critique and revision; without requests of its own it takes those of its principle."""

    prompt: Annotated[tuple[Turn, ...], Field(min_length=1)]
    completion: Text
    critique: Text
    revision: Text
    critique_request: Text | None = None
    revision_request: Text | None = None
    principle: str | None = None

    @field_validator("prompt", mode="before")
    @classmethod
    def _one_turn(cls, value: Any) -> Any:
        return [{"role": "user", "content": value}] if isinstance(value, str) else value

    @property
    def conversation(self) -> Conversation:
        return tuple(Message(turn.role, turn.content) for turn in self.prompt)


class WorkedComparison(Block):
    """A worked choice between two completions, which a judge may be shown before it chooses itself."""

    prompt: Annotated[tuple[Turn, ...], Field(min_length=1)]
    better: Text
    worse: Text
    reasoning: Annotated[Text | None, Field(description="what is thought before the choice; names `answer`")] = None
    answer: Annotated[Literal["A", "B"] | None, Field(description="where the better one stands; drawn if null")] = None
    principle: str | None = None

    @field_validator("prompt", mode="before")
    @classmethod
    def _one_turn(cls, value: Any) -> Any:
        return [{"role": "user", "content": value}] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _reasons_for_an_answer(self) -> Self:
        if self.reasoning and self.answer is None:
            raise ValueError("a reasoning names its `answer`: set it to A or B, where the better one stands")
        return self

    @property
    def conversation(self) -> Conversation:
        return tuple(Message(turn.role, turn.content) for turn in self.prompt)


class Principle(Block):
    """One principle: what it asks, how completions are revised towards it, and how judges are asked about it."""

    id: Annotated[str, Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")]
    text: Annotated[str, Field(description="the principle as an instruction to the assistant")] = ""
    opposite: Annotated[Text | None, Field(description="the opposite instruction, for the contrast judge")] = None
    critique: Annotated[Text | None, Field(description="the request for a critique")] = None
    revision: Annotated[Text | None, Field(description="the request for a revision")] = None
    compare: Annotated[Text | None, Field(description="the question put to a choosing judge")] = None
    rule: Rule | None = None
    tier: str | None = None
    framing: Literal["negative", "positive", "neutral"] = "neutral"
    hard: Annotated[bool, Field(description="decides before every tier, and its rule's violation rejects")] = False
    weight: Annotated[Number, Field(gt=0)] = 1.0
    applies: Annotated[tuple[str, ...], Field(description="categories of prompts; empty is all")] = ()
    rationale: str | None = None
    probes: tuple[Probe, ...] = ()

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if (self.critique is None) != (self.revision is None):
            raise ValueError("critique and revision go together; give both or none")
        if not (self.text or self.critique or self.compare):
            raise ValueError("needs a `text`: the principle as an instruction to the assistant")
        return self

    def applies_to(self, category: str) -> bool:
        return not self.applies or category in self.applies

    def keeps_rule(self, text: str) -> bool:
        """Whether the text keeps the principle's rule; True where it has none."""
        return self.rule is None or self.rule.holds(text)

    @property
    def requests(self) -> tuple[str, str] | None:
        """What asks for a critique and for a revision; None for a principle that is only for comparing."""
        if self.critique and self.revision:
            return self.critique, self.revision
        if not self.text:
            return None
        return (
            f"Point out where the assistant's last answer does not follow this principle: {self.text}",
            f"Rewrite the assistant's last answer so that it follows this principle: {self.text} "
            "Write only the rewritten answer.",
        )

    @property
    def question(self) -> str | None:
        """What a choosing judge is asked; None for a principle that is only for revising."""
        if self.compare or not self.text:
            return self.compare
        return f"Choose the response that follows this principle better: {self.text}"


class _Content(Block):
    """What a constitution holds, before and after `extends`."""

    title: Text
    version: Text = "1"
    licence: str = ""
    source: str = ""
    language: str = "en"
    preamble: str | None = None
    tiers: tuple[str, ...] = ()
    principles: tuple[Principle, ...] = ()
    examples: tuple[Example, ...] = ()
    comparisons: tuple[WorkedComparison, ...] = ()


class ConstitutionFile(_Content):
    """A constitution as written."""

    extends: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()

    @field_validator("extends", mode="before")
    @classmethod
    def _one_parent(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


class Constitution(_Content):
    """A constitution after `extends`: at least one principle, ids unique. `id` is the file's stem."""

    id: str

    @property
    def worked_comparisons(self) -> tuple[WorkedComparison, ...]:
        """Every worked choice."""
        return self.comparisons

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical content, without the id."""
        return digest(self.model_dump(mode="json", exclude={"id"}, exclude_defaults=True), length=64)

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


def load_constitution(path: str | Path) -> Constitution:
    """The constitution of a YAML file, or of a folder or file of the Constitutional AI paper's JSON.

    Raises:
        InputError: no such file.
        FileProblems: every fault of the file, with lines.
    """
    return _load(Path(path), ())


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
    resolved = path.resolve()
    if resolved in below:
        chain = " → ".join(part.name for part in (*below[below.index(resolved) :], resolved))
        raise FileProblems(str(below[-1]), [Problem("extends", f"goes round in a circle: {chain}")])
    if path.is_dir() or path.suffix == ".json":
        return _from_paper(path)
    written, lines = _read(path)
    parents = [_load(_parent(path, name, lines), (*below, resolved)) for name in written.extends]
    constitution = _merged(_safe(path.stem), written, parents)
    if problems := list(_reference_problems(written, constitution, parents, lines)):
        raise FileProblems(str(path), problems)
    return constitution


def _from_paper(path: Path) -> Constitution:
    try:
        return Constitution(id=_safe(path.resolve().stem), **paper_content(path))
    except ValidationError as error:
        raise FileProblems(str(path), problems_from(error, Lines(str(path)), Constitution)) from None


def _safe(stem: str) -> str:
    """The stem as part of a directory's name."""
    return re.sub(r"[^\w.-]+", "-", stem)


def _read(path: Path) -> tuple[ConstitutionFile, Lines]:
    content, lines = load_yaml(path)
    problems = list(_duplicate_ids(content, lines))
    try:
        written = ConstitutionFile.model_validate(content)
        problems += _probe_problems(written, lines)
    except ValidationError as error:
        problems += problems_from(error, lines, ConstitutionFile)
    if problems:
        raise FileProblems(str(path), problems)
    return written, lines


def _parent(path: Path, name: str, lines: Lines) -> Path:
    parent = path.parent / name
    if not parent.exists():
        fault = f"no file {name} beside {path.name}; paths are relative to the constitution's own folder"
        raise FileProblems(str(path), [Problem("extends", fault, lines.of(("extends",)))])
    return parent


def _merged(constitution_id: str, written: ConstitutionFile, parents: Sequence[Constitution]) -> Constitution:
    """The child's own words where it has them; principles by id, a child's in the place of its parent's."""
    inherited = [principle for parent in parents for principle in parent.principles if principle.id not in written.drop]
    principles = {principle.id: principle for principle in (*inherited, *written.principles)}
    tiers = dict.fromkeys(tier for parent in parents for tier in parent.tiers)
    return Constitution(
        id=constitution_id,
        title=written.title,
        version=written.version,
        licence=written.licence,
        source=written.source,
        language=written.language,
        preamble=written.preamble,
        tiers=written.tiers or tuple(tiers),
        principles=tuple(principles.values()),
        examples=written.examples or tuple(_inherited_examples(parents, principles)),
        comparisons=written.comparisons or tuple(each for parent in parents for each in parent.comparisons),
    )


def _inherited_examples(parents: Sequence[Constitution], principles: Iterable[str]) -> Iterator[Example]:
    kept = {None, *principles}
    return (example for parent in parents for example in parent.examples if example.principle in kept)


def _duplicate_ids(content: dict[str, Any], lines: Lines) -> Iterator[Problem]:
    """Found before the schema is checked, so that they are reported with its faults."""
    principles = content.get("principles")
    first: dict[str, KeyPath] = {}
    for index, principle in enumerate(principles if isinstance(principles, list) else ()):
        name = principle.get("id") if isinstance(principle, dict) else None
        path: KeyPath = ("principles", index, "id")
        if isinstance(name, str) and first.setdefault(name, path) != path:
            fault = f"'{name}' is taken by the principle on line {lines.of(first[name])}; ids must be unique"
            yield Problem(f"principles[{index}].id", fault, lines.of(path))


def _probe_problems(written: ConstitutionFile, lines: Lines) -> Iterator[Problem]:
    """Probes on which a principle's own rule disagrees."""
    for index, principle in enumerate(written.principles):
        for number, probe in enumerate(principle.probes if principle.rule else ()):
            for key, text, expected in (("better", probe.better, True), ("worse", probe.worse, False)):
                if principle.keeps_rule(text) != expected:
                    fault = f"must {'keep' if expected else 'break'} the principle's rule ({principle.rule})"
                    path = ("principles", index, "probes", number, key)
                    yield Problem(f"{principle.id}: probes[{number}].{key}", fault, lines.of(path))


def _reference_problems(
    written: ConstitutionFile, constitution: Constitution, parents: Sequence[Constitution], lines: Lines
) -> Iterator[Problem]:
    """Names that name nothing: tiers, dropped principles, the examples' principles; and nothing to go by at all."""
    if not constitution.principles:
        yield Problem("principles", "a constitution needs at least one principle", lines.of(("principles",)))
    ids = {principle.id for principle in constitution.principles}
    inherited = {principle.id for parent in parents for principle in parent.principles}
    for index, name in enumerate(written.drop):
        if name not in inherited:
            yield Problem("drop", _unknown(name, "inherited principle", inherited), lines.of(("drop", index)))
    for index, example in enumerate(written.examples):
        if example.principle is not None and example.principle not in ids:
            path: KeyPath = ("examples", index, "principle")
            yield Problem(f"examples[{index}].principle", _unknown(example.principle, "principle", ids), lines.of(path))
    own = {principle.id: index for index, principle in enumerate(written.principles)}
    for principle in constitution.principles:
        if principle.tier is not None and principle.tier not in constitution.tiers:
            path = ("principles", own[principle.id], "tier") if principle.id in own else ("tiers",)
            yield Problem(f"{principle.id}.tier", _unknown(principle.tier, "tier", constitution.tiers), lines.of(path))
    for tier, count in Counter(written.tiers).items():
        if count > 1:
            yield Problem("tiers", f"'{tier}' is there {count} times; keep one", lines.of(("tiers",)))


def _unknown(name: str, kind: str, known: Iterable[str]) -> str:
    names = sorted(known)
    match = nearest(name, names)
    remedy = f"did you mean `{match}`?" if match else f"there are {', '.join(names) or 'none'}"
    return f"'{name}' is no {kind}; {remedy}"
