"""Compares two constitutions: their texts, and the labels that one judge gives the same pairs under each.

Two controls give the difference its scale. The null band is how far labels move when nothing of substance changes:
under a paraphrase of A, and under A with another seed. The placebo is a constitution that is irrelevant to every
ordinary pair: what a judge decides by it is the judge's own taste.

The seed matters only to a judge that samples something: one principle for each pair, a chain of thought, or which
worked choices it is shown. Such a judge labels the pairs under A once more with another seed. Any other judge gives the
same labels under every seed; then the choice of pairs is the only source of chance, and the intervals over prompts
account for it.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.constitution.constitution import Constitution
from align.constitution.loading import load_constitution
from align.constitution.text_diff import Change, text_changes
from align.engines.engine import Engine
from align.errors import InputError
from align.feedback.agreement import Label
from align.feedback.judge import Judge, judge_problems
from align.feedback.opinions import Question
from align.feedback.probes import ProbeReport, examine_judge
from align.results.judged_pairs import CONSTITUTIONS, JudgeSettings, Pair
from align.results.label_diff import (
    Movement,
    PrinciplePull,
    SharedPrinciple,
    label_movement,
    largest_changes,
    moved_beyond,
    principle_pulls,
    shared_principles,
)

A, B, PARAPHRASE, SEED, PLACEBO = "A", "B", "A in other words", "A with another seed", "placebo"
"""The roles of constitutions in a comparison. SEED is A itself, judged with the second of `SEEDS`."""

SEEDS = (0, 1)
LARGEST_SHOWN = 10
PLACEBO_FILE = "placebo.yaml"


@dataclass(frozen=True)
class Labelling:
    """The labels of all pairs under one constitution, and how its judge did on its probes."""

    role: str
    constitution: Constitution
    labels: tuple[Label, ...]
    probes: ProbeReport | None


@dataclass(frozen=True)
class ConstitutionDiff:
    """A compared with B and with the controls: `others` are the null labellings and the placebo's."""

    judge: str
    pairs: tuple[Pair, ...]
    a: Labelling
    b: Labelling
    others: tuple[Labelling, ...]
    texts: tuple[Change, ...]

    def moved(self, other: Labelling) -> Movement:
        return label_movement(self.pairs, self.a.labels, other.labels)

    @property
    def nulls(self) -> tuple[Labelling, ...]:
        return tuple(each for each in self.others if each.role != PLACEBO)

    @property
    def beyond_null(self) -> bool | None:
        """Whether B flips more labels than every null labelling, by intervals that do not overlap.

        None if it cannot be said: no null labelling, or not B, decides any pair that A decides too.
        """
        moved = self.moved(self.b)
        nulls = [null for each in self.nulls if (null := self.moved(each)).flipped]
        return all(moved_beyond(moved, null) for null in nulls) if moved.flipped and nulls else None

    @property
    def pulls(self) -> list[PrinciplePull]:
        return principle_pulls(self.a.labels, self.b.labels)

    @property
    def shared(self) -> list[SharedPrinciple]:
        return shared_principles(self.pairs, self.a.labels, self.b.labels)

    @property
    def largest(self) -> list[int]:
        return largest_changes(self.a.labels, self.b.labels, LARGEST_SHOWN)

    def as_json(self) -> dict[str, Any]:
        """The content of the page, for a JSON file."""
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
                    **dataclasses.asdict(self.pairs[index]),
                    "under_a": dataclasses.asdict(self.a.labels[index]),
                    "under_b": dataclasses.asdict(self.b.labels[index]),
                }
                for index in self.largest
            ],
        }


def file_beside(path: Path, name: str) -> Path | None:
    """The file of this name in the constitution's folder, if it exists and is not the constitution itself."""
    found = path.parent / name
    return found if found.is_file() and found != path else None


def placebo_of(path: Path) -> Path | None:
    """The placebo in the constitution's folder, or else the one shipped with the project, if it can be found."""
    shipped = CONSTITUTIONS / PLACEBO_FILE
    return file_beside(path, PLACEBO_FILE) or (shipped if shipped.is_file() and not shipped.samefile(path) else None)


def diff_constitutions(
    paths: tuple[Path, Path],
    pairs: Sequence[Pair],
    settings: JudgeSettings,
    null: Path | None = None,
    placebo: Path | None = None,
) -> ConstitutionDiff:
    """Compare the constitutions' texts and the labels of the pairs under each.

    Args:
        null: a paraphrase of A.
        placebo: the placebo constitution.

    Raises:
        InputError: a constitution is invalid or unusable with this judge, or there are no pairs.
    """
    if not pairs:
        raise InputError("no pairs to judge; name a file or a run with --pairs")
    roles = {A: paths[0], B: paths[1], PARAPHRASE: null, PLACEBO: placebo}
    constitutions = {role: load_constitution(path) for role, path in roles.items() if path}
    if problems := [fault for each in constitutions.values() for fault in judge_problems(each, settings.block)]:
        raise InputError("\n".join(problems))
    engine = _engine(settings)
    judges = {role: _judge(each, settings, engine, SEEDS[0]) for role, each in constitutions.items()}
    if settings.depends_on_seed:
        judges[SEED] = _judge(constitutions[A], settings, engine, SEEDS[1])
    labellings = {role: _label(role, judge, pairs) for role, judge in judges.items()}
    texts = tuple(text_changes(constitutions[A], constitutions[B]))
    others = tuple(labellings[role] for role in (PARAPHRASE, SEED, PLACEBO) if role in labellings)
    return ConstitutionDiff(judges[A].name, tuple(pairs), labellings[A], labellings[B], others, texts)


def labels_of(judge: Judge, pairs: Sequence[Pair]) -> list[Label]:
    """The judge's label of each pair."""
    questions = [Question(pair.id, pair.prompt, pair.a, pair.b, pair.category) for pair in pairs]
    return [Label(verdict.p_a, verdict.by_principle) for verdict in judge.compare(questions)]


def open_settings_judge(constitution: Constitution, settings: JudgeSettings) -> Judge:
    """A judge with these settings that averages over all principles."""
    return Judge(constitution, settings.block, _engine(settings))


def _engine(settings: JudgeSettings) -> Engine | None:
    if settings.block.kind == "rule" or settings.model is None:
        return None
    from align.engines.open import open_engine

    return open_engine(settings.block.engine, settings.model)


def _judge(constitution: Constitution, settings: JudgeSettings, engine: Engine | None, seed: int) -> Judge:
    return Judge(constitution, settings.block, engine, draw_seed=seed if settings.draws_principle else None, seed=seed)


def _label(role: str, judge: Judge, pairs: Sequence[Pair]) -> Labelling:
    report = examine_judge(judge) if any(principle.probes for principle in judge.principles) else None
    return Labelling(role, judge.constitution, tuple(labels_of(judge, pairs)), report)
