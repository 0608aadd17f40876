"""What a source's rows are taken for, how they are rendered and masked, and which would be left out."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from align.data.conversations import merge_turns
from align.data.demonstrations import read_demonstrations
from align.data.layouts import RANKED, canonical, recognise, selected
from align.data.pairs import read_pairs
from align.data.prompt_fit import require_whole
from align.data.prompts import CUT, ODD_SPLIT, stream_prompts
from align.data.reading import BrokenRow
from align.data.sources import Intake, LeftOut, source_rows
from align.errors import InputError
from align.records import Conversation, Demonstration, PreferencePair, Prompt
from align.records import Row as Record
from align.settings.data import DataSource, PairSource, PromptsBlock, PromptSource

Kind = Literal["pairs", "demonstrations", "prompts"]
S = TypeVar("S", bound=DataSource)
KINDS: tuple[Kind, ...] = ("pairs", "demonstrations", "prompts")
UNKNOWN = "unknown layout"
SHOWN_ROWS = 5
SHOWN_FAULTS = 3


@dataclass(frozen=True)
class Part:
    """A part of a rendered row: its text, and whether its tokens count in the loss."""

    name: str
    text: str
    counts: bool


@dataclass(frozen=True)
class Example:
    """A row as it is rendered: where it stands, its parts, and a pair's soft label."""

    place: str
    parts: tuple[Part, ...]
    probability: float | None = None


@dataclass
class DataCheck:
    """What became of a source. `lengths` are in tokens, or in characters without a tokenizer."""

    source: DataSource
    kind: Kind
    rows: int = 0
    layouts: Counter[str] = field(default_factory=Counter)
    records: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    repeated: int = 0
    other_counts: dict[str, int] = field(default_factory=dict)
    faults: dict[str, list[LeftOut]] = field(default_factory=dict)
    lengths: dict[str, list[int]] = field(default_factory=dict)
    too_long: int = 0
    examples: list[Example] = field(default_factory=list)

    @property
    def unusable(self) -> int:
        return self.left_out[f"{self.kind}_unusable"] + self.left_out[f"{self.kind}_refused_by_the_template"]

    @property
    def problems(self) -> list[str]:
        """Why a stage that reads the source would stop."""
        found = []
        if self.unusable > self.source.max_unusable * self.rows:
            found.append(
                f"{self.unusable} of {self.rows} rows are unusable, more than `max_unusable` allows "
                f"({self.source.max_unusable:g}): a stage that reads this stops"
            )
        if not self.records - self.too_long:
            found.append(f"no row is left as one of {self.kind}")
        return found


class _Faults:
    """The first rows left out for each reason, in the place of a file of all."""

    def __init__(self, found: dict[str, list[LeftOut]]) -> None:
        self.found = found

    def add(self, row: Record) -> None:
        assert isinstance(row, LeftOut)
        some = self.found.setdefault(row.reason, [])
        if len(some) < SHOWN_FAULTS:
            some.append(row)


def check_source(
    source: DataSource,
    kind: Kind | None = None,
    *,
    tokenizer: Any = None,
    system_prompt: str | None = None,
    max_length: int | None = None,
) -> DataCheck:
    """Read all of a source as a stage would, without stopping at unusable rows.

    Args:
        kind: what to take the rows for; None goes by their layout.
        max_length: in tokens; longer rows count as too long.

    Raises:
        InputError: the source cannot be read at all.
    """
    rows, layouts, forms = _survey(source)
    check = DataCheck(source, kind or _kind(forms), rows, layouts)
    intake = Intake(file=_Faults(check.faults))
    records = _records(check, intake)
    render = _renderer(tokenizer, system_prompt) if tokenizer else _plain
    for record in records:
        place = intake.places.get(record.id, getattr(record, "source", ""))
        try:
            example, lengths = render(record, place)
        except InputError as error:
            intake.leave_out(f"{check.kind}_refused_by_the_template", place, record.to_json(), str(error))
            continue
        check.records += 1
        check.too_long += bool(tokenizer) and max_length is not None and lengths["whole row"] > max_length
        for name, length in lengths.items():
            check.lengths.setdefault(name, []).append(length)
        if len(check.examples) < SHOWN_ROWS:
            check.examples.append(example)
    check.left_out = intake.left_out
    check.repeated = intake.counts[f"{check.kind}_repeated"]
    check.other_counts = {name: intake.counts[name] for name in (ODD_SPLIT, CUT) if intake.counts[name]}
    return check


def _survey(source: DataSource) -> tuple[int, Counter[str], Counter[str]]:
    """The number of rows, and of those of each layout and each kind."""
    rows, layouts, kinds = 0, Counter[str](), Counter[str]()
    for place, _, row in source_rows(source):
        rows += 1
        try:
            chosen = {} if isinstance(row, BrokenRow) else selected(row, source.columns, place)
            form = canonical(chosen, place)
        except InputError:
            chosen, form = {}, {}
        layout = recognise(chosen)
        layouts[layout.name if layout else UNKNOWN] += 1
        kinds[_kind_of(form)] += 1
    return rows, layouts, kinds


def _kind_of(form: dict[str, Any]) -> str:
    if form.get("chosen") is not None or RANKED in form or "score" in form:
        return "pairs"
    if form.get("messages") is not None or form.get("completion") is not None:
        return "demonstrations"
    return "prompts" if form.get("prompt") is not None else UNKNOWN


def _kind(forms: Counter[str]) -> Kind:
    return max(KINDS, key=lambda kind: forms[kind])


def _records(check: DataCheck, intake: Intake) -> Iterator[Any]:
    source = check.source.model_copy(update={"max_unusable": 1.0})
    try:
        if check.kind == "prompts":
            yield from stream_prompts(PromptsBlock(sources=(_as(PromptSource, source),)), intake)
        else:
            read = read_pairs if check.kind == "pairs" else read_demonstrations
            yield from read(_as(PairSource, source), intake)
    except InputError:
        # Without a usable row the reader raises; the report says so, with the reasons.
        if not intake.left_out:
            raise


def _as(kind: type[S], source: DataSource) -> S:
    """The source as one of the kind, with the settings that both have."""
    if isinstance(source, kind):
        return source
    return kind(**{name: getattr(source, name) for name in DataSource.model_fields})


Render = Callable[[Any, str], tuple[Example, dict[str, int]]]


def _renderer(tokenizer: Any, system_prompt: str | None) -> Render:
    """Renders records with the chat template, in tokens."""
    from align.data.chat import conversation_ids, prompt_ids

    def render(record: Any, place: str) -> tuple[Example, dict[str, int]]:
        require_whole(tokenizer, record.prompt, system_prompt)
        sides = _sides(record)
        if not sides:
            ids = {"prompt": prompt_ids(tokenizer, record.prompt, system_prompt)}
        else:
            ids = {}
            for name, text in sides.items():
                ids["prompt"], ids[name] = conversation_ids(tokenizer, record.prompt, text, system_prompt)
        texts = {name: tokenizer.decode(some) for name, some in ids.items()}
        return _example(record, place, texts), _lengths({name: len(some) for name, some in ids.items()})

    return render


def _plain(record: Any, place: str) -> tuple[Example, dict[str, int]]:
    """A record without a chat template, in characters."""
    texts = {"prompt": _text(record.prompt), **_sides(record)}
    return _example(record, place, texts), _lengths({name: len(text) for name, text in texts.items()})


def _text(conversation: Conversation) -> str:
    return "\n".join(f"{message.role}: {message.content}" for message in merge_turns(conversation))


def _sides(record: Prompt | Demonstration | PreferencePair) -> dict[str, str]:
    """The answers of a record, by name."""
    if isinstance(record, PreferencePair):
        return {"chosen": record.chosen[-1].content, "rejected": record.rejected[-1].content}
    return {"completion": record.completion} if isinstance(record, Demonstration) else {}


def _example(record: Any, place: str, texts: dict[str, str]) -> Example:
    parts = tuple(Part(name, text, counts=name != "prompt") for name, text in texts.items())
    return Example(place, parts, getattr(record, "probability", None))


def _lengths(lengths: dict[str, int]) -> dict[str, int]:
    answers = [length for name, length in lengths.items() if name != "prompt"]
    return {**lengths, "whole row": lengths["prompt"] + max(answers, default=0)}


def percentiles(lengths: Sequence[int], parts: Sequence[float]) -> list[int]:
    """The lengths below which these shares of all lengths lie, by the nearest rank."""
    ordered = sorted(lengths)
    return [ordered[round(part * (len(ordered) - 1))] for part in parts]
