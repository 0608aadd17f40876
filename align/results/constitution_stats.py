"""Measures what each principle of a constitution did in a run, from the rows that `revise` and `compare` published."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from align.constitution.constitution import Constitution
from align.errors import InputError
from align.feedback.agreement import Agreement, Label, agreement_between, margins_of, side_of
from align.feedback.critique_findings import finds_fault
from align.feedback.judge import BOTH_BREAK, TIE
from align.feedback.records import JUDGED_WORSE, NEAR_DUPLICATE, Comparison, Critique, Revision
from align.records import read_rows
from align.results.judged_pairs import COMPARE, COMPARISONS, Pair, judge_in
from align.run.artefacts import read_manifest, require_run, stage_folder
from align.settings.blocks import JudgeBlock


@dataclass(frozen=True)
class Share:
    """`hits` out of `n`, where a tie counts as half a hit. With no cases at all (`n` is 0) there is no share."""

    hits: float
    n: int

    @classmethod
    def of(cls, outcomes: Iterable[float]) -> "Share":
        values = list(outcomes)
        return cls(sum(values), len(values))

    @property
    def value(self) -> float | None:
        return self.hits / self.n if self.n else None


NOTHING = Share(0, 0)


@dataclass(frozen=True)
class PrincipleStats:
    """One principle in one run.

    Attributes:
        drawn: rounds of critique and revision that drew it, of all rounds.
        found_fault: its critiques that found a fault, of those that are not empty.
        accepted: accepted revisions, of those whose rounds drew it.
        won: revisions that the judge preferred to the original, of those that it led to and the judge saw.
        with_rest: comparisons on which it agrees with the weighted mean of the other principles, of those that both
            decide.
        with_people: pairs on which it agrees with people's preference, of those that it decides.
    """

    principle: str
    drawn: Share = NOTHING
    found_fault: Share = NOTHING
    accepted: Share = NOTHING
    won: Share = NOTHING
    with_rest: Share = NOTHING
    with_people: Share = NOTHING


@dataclass(frozen=True)
class RunRows:
    """The rows of a run's `revise` and `compare`, and the judge of `compare`. A `missing` stage has no rows."""

    critiques: Sequence[Critique] = ()
    revisions: Sequence[Revision] = ()
    comparisons: Sequence[Comparison] = ()
    missing: tuple[str, ...] = field(default=())
    judge: JudgeBlock = field(default_factory=JudgeBlock)


def read_run(run: Path) -> RunRows:
    """The rows of a run.

    Raises:
        InputError: neither `revise` nor `compare` is done.
    """
    require_run(run)
    revise, compare = stage_folder(run, "revise"), stage_folder(run, COMPARE)
    present = {name: (folder / "manifest.json").is_file() for name, folder in (("revise", revise), (COMPARE, compare))}
    if not any(present.values()):
        raise InputError(f"{run}: neither `revise` nor `compare` is done in it; name a run's folder")
    files = [revise / name for name in ("revisions.jsonl", "rejected.jsonl")] if present["revise"] else []
    manifest = read_manifest(compare)
    return RunRows(
        critiques=list(read_rows(revise / "critiques.jsonl", Critique)) if present["revise"] else [],
        revisions=[row for path in files for row in read_rows(path, Revision)],
        comparisons=list(read_rows(compare / COMPARISONS, Comparison)) if present[COMPARE] else [],
        missing=tuple(name for name, done in present.items() if not done),
        judge=judge_in(manifest).block if manifest else JudgeBlock(),
    )


def principle_names(rows: RunRows, constitution: Constitution | None) -> list[str]:
    """The constitution's principles in order, then those that only the rows name."""
    known = [principle.id for principle in constitution.principles] if constitution else []
    seen = [row.principle_id for row in rows.critiques]
    seen += [name for row in rows.comparisons for name in row.p_a_by_principle]
    return list(dict.fromkeys([*known, *seen]))


def principle_stats(
    rows: RunRows,
    constitution: Constitution | None = None,
    human: Sequence[tuple[Pair, Label]] = (),
) -> list[PrincipleStats]:
    """The figures of each principle; without the constitution, every weight is 1.

    Args:
        human: pairs whose human preference is known, each with the judge's label.
    """
    weights = {each.id: each.weight for each in constitution.principles} if constitution else {}
    margin, _ = margins_of(rows.judge)
    found = []
    for name in principle_names(rows, constitution):
        critiques = [row for row in rows.critiques if row.principle_id == name]
        led_to = [row for row in rows.revisions if name in (row.revised_by or row.principle_ids)]
        opinions = [row.p_a_by_principle for row in rows.comparisons]
        stats = PrincipleStats(
            name,
            drawn=Share(len(critiques), len(rows.critiques)),
            found_fault=Share.of(fault for row in critiques if (fault := finds_fault(row.critique)) is not None),
            accepted=Share.of(row.accepted for row in rows.revisions if name in row.principle_ids),
            won=Share.of(outcome for row in led_to if (outcome := _outcome(row)) is not None),
            with_rest=_agreement_with_rest(name, opinions, weights, margin),
            with_people=_agreement_with_people(name, human, margin),
        )
        found.append(stats)
    return found


def run_agreement(rows: RunRows, constitution: Constitution | None = None) -> Agreement:
    """Where the principles that judged the run's comparisons agree and conflict."""
    judged = {name for row in rows.comparisons for name in row.p_a_by_principle}
    names = [name for name in principle_names(rows, constitution) if name in judged]
    labels = [Label(row.p_a, row.p_a_by_principle) for row in rows.comparisons]
    return agreement_between(names, labels, *margins_of(rows.judge))


def conflicts_between_tiers(agreement: Agreement, constitution: Constitution) -> Share:
    """Of the decided conflicts between principles of different tiers, how many the earlier tier's principle won."""
    ranks = {each.id: constitution.rank(each) for each in constitution.principles}
    names = agreement.principles
    earlier = [
        (i, j)
        for i, one in enumerate(names)
        for j, other in enumerate(names)
        if one in ranks and other in ranks and ranks[one] < ranks[other]
    ]
    won = sum(agreement.won[i][j] for i, j in earlier)
    return Share(won, won + sum(agreement.won[j][i] for i, j in earlier))


def _outcome(row: Revision) -> float | None:
    """1 if the judge preferred the revision, 0 if the original, 0.5 for a tie; None if it was not judged."""
    if row.accepted or row.reason == NEAR_DUPLICATE:
        return 1.0
    if row.reason.startswith((TIE, BOTH_BREAK)):
        return 0.5
    return 0.0 if row.reason == JUDGED_WORSE else None


def _agreement_with_rest(
    name: str, opinions: Iterable[Mapping[str, float]], weights: Mapping[str, float], margin: float
) -> Share:
    agrees = []
    for given in opinions:
        others = {other: weights.get(other, 1.0) for other in given if other != name}
        if name not in given or not others:
            continue
        rest = sum(weight * given[other] for other, weight in others.items()) / sum(others.values())
        sides = side_of(given[name], margin), side_of(rest, margin)
        if all(sides):
            agrees.append(sides[0] == sides[1])
    return Share.of(agrees)


def _agreement_with_people(name: str, human: Sequence[tuple[Pair, Label]], margin: float) -> Share:
    return Share.of(
        (side > 0) == pair.a_preferred
        for pair, label in human
        if pair.a_preferred is not None and (side := side_of(label.by_principle.get(name), margin))
    )
