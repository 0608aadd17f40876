"""What a change of constitution changes: its texts, and the labels that one judge gives the same pairs under both.

A difference means something beside two others. The null band is how far labels move where nothing of substance
changed: A in other words, and A under another seed. The placebo is a constitution that no ordinary pair turns on: what
a judge decides by it is the judge's own taste.

A judge that averages over all principles and only scores draws nothing: another seed gives it the same labels, and
chance is only in which pairs there are, which the intervals over prompts show. One that draws (a principle for each
pair, a chain of thought, what worked choices show) judges again with another seed.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.constitution.constitution import Constitution, load_constitution
from align.constitution.text_diff import Change, text_changes
from align.engines.engine import Engine
from align.errors import InputError
from align.feedback.agreement import Label
from align.feedback.judge import Judge, judge_problems
from align.feedback.opinions import Question
from align.feedback.probes import ProbeReport, examine_judge
from align.results.judged_pairs import CONSTITUTIONS, JudgeSettings
from align.results.label_changes import (
    Movement,
    Pair,
    PrinciplePull,
    SharedPrinciple,
    beyond,
    largest,
    movement,
    pulls,
    shared_principles,
)

SHOWN = 10
PLACEBO_FILE = "placebo.yaml"
SEEDS = (0, 1)


@dataclass(frozen=True)
class Labelling:
    """One constitution's labels of all pairs. `role`: A, B, A in other words, A with another seed, placebo."""

    role: str
    constitution: Constitution
    labels: tuple[Label, ...]
    probes: ProbeReport | None


@dataclass(frozen=True)
class ConstitutionDiff:
    """A beside B, and beside what should not differ from it. `others` are the null labellings and the placebo's."""

    judge: str
    pairs: tuple[Pair, ...]
    a: Labelling
    b: Labelling
    others: tuple[Labelling, ...]
    texts: tuple[Change, ...]

    def moved(self, other: Labelling) -> Movement:
        return movement(self.pairs, self.a.labels, other.labels)

    @property
    def nulls(self) -> tuple[Labelling, ...]:
        return tuple(each for each in self.others if each.role != PLACEBO)

    @property
    def beyond_null(self) -> bool | None:
        """Whether B flips more than every null labelling by whole intervals; None where that cannot be said: there is
        no null labelling, or none (or B itself) that decides a pair which A decides too."""
        moved = self.moved(self.b)
        nulls = [null for each in self.nulls if (null := self.moved(each)).flipped]
        return all(beyond(moved, null) for null in nulls) if moved.flipped and nulls else None

    @property
    def pulls(self) -> list[PrinciplePull]:
        return pulls(self.a.labels, self.b.labels)

    @property
    def shared(self) -> list[SharedPrinciple]:
        return shared_principles(self.pairs, self.a.labels, self.b.labels)

    @property
    def largest(self) -> list[int]:
        return largest(self.a.labels, self.b.labels, SHOWN)

    def as_json(self) -> dict[str, Any]:
        """Everything that the page shows, for a file."""
        moved = {each.role: dataclasses.asdict(self.moved(each)) for each in (self.b, *self.others)}
        return {
            "judge": self.judge,
            "constitutions": {each.role: each.constitution.key for each in (self.a, self.b, *self.others)},
            "probes": {each.role: each.probes and each.probes.as_figures() for each in (self.a, self.b, *self.others)},
            "texts": [dataclasses.asdict(each) for each in self.texts],
            "moved": moved,
            "beyond_null": self.beyond_null,
            "principles": [dataclasses.asdict(each) for each in self.pulls],
            "shared_principles": [dataclasses.asdict(each) for each in self.shared],
            "largest": [
                {
                    **dataclasses.asdict(self.pairs[place]),
                    "under_a": dataclasses.asdict(self.a.labels[place]),
                    "under_b": dataclasses.asdict(self.b.labels[place]),
                }
                for place in self.largest
            ],
        }


A, B, PARAPHRASE, SEED, PLACEBO = "A", "B", "A in other words", "A with another seed", "placebo"


def beside(path: Path, name: str) -> Path | None:
    """A file in the constitution's own folder, where there is one that is not the constitution itself."""
    found = path.parent / name
    return found if found.is_file() and found != path else None


def placebo_of(path: Path) -> Path | None:
    """The placebo beside the constitution, or else the one that the project ships, where it is at hand."""
    shipped = CONSTITUTIONS / PLACEBO_FILE
    return beside(path, PLACEBO_FILE) or (shipped if shipped.is_file() and not shipped.samefile(path) else None)


def diff_constitutions(
    paths: tuple[Path, Path],
    pairs: Sequence[Pair],
    settings: JudgeSettings,
    null: Path | None = None,
    placebo: Path | None = None,
) -> ConstitutionDiff:
    """Compare the constitutions' texts and their labels of the pairs.

    Raises:
        InputError: a constitution's faults, one that this judge cannot read, or no pairs.
    """
    if not pairs:
        raise InputError("no pairs to judge; name a file or a run with --pairs")
    roles = {A: paths[0], B: paths[1], PARAPHRASE: null, PLACEBO: placebo}
    constitutions = {role: load_constitution(path) for role, path in roles.items() if path}
    if problems := [fault for each in constitutions.values() for fault in judge_problems(each, settings.block)]:
        raise InputError("\n".join(problems))
    engine = _engine(settings)
    judges = {role: _judge(each, settings, engine, SEEDS[0]) for role, each in constitutions.items()}
    if settings.by_chance:
        judges[SEED] = _judge(constitutions[A], settings, engine, SEEDS[1])
    labelled = {role: _labelled(role, judge, pairs) for role, judge in judges.items()}
    texts = tuple(text_changes(constitutions[A], constitutions[B]))
    others = tuple(labelled[role] for role in (PARAPHRASE, SEED, PLACEBO) if role in labelled)
    return ConstitutionDiff(judges[A].name, tuple(pairs), labelled[A], labelled[B], others, texts)


def labels_of(judge: Judge, pairs: Sequence[Pair]) -> list[Label]:
    """The judge's label of each pair."""
    questions = [Question(pair.id, pair.prompt, pair.a, pair.b, pair.category) for pair in pairs]
    return [Label(verdict.p_a, verdict.by_principle) for verdict in judge.compare(questions)]


def open_settings_judge(constitution: Constitution, settings: JudgeSettings) -> Judge:
    """A judge by these settings that averages over all principles."""
    return Judge(constitution, settings.block, _engine(settings))


def _engine(settings: JudgeSettings) -> Engine | None:
    if settings.block.kind == "rule" or settings.model is None:
        return None
    from align.engines.open import open_engine

    return open_engine(settings.block.engine, settings.model)


def _judge(constitution: Constitution, settings: JudgeSettings, engine: Engine | None, seed: int) -> Judge:
    return Judge(constitution, settings.block, engine, draw_seed=seed if settings.draws else None, seed=seed)


def _labelled(role: str, judge: Judge, pairs: Sequence[Pair]) -> Labelling:
    report = examine_judge(judge) if any(principle.probes for principle in judge.principles) else None
    return Labelling(role, judge.constitution, tuple(labels_of(judge, pairs)), report)
