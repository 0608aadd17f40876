"""Measures how the labels of the same pairs differ between two labellings, for `align constitution diff`.

It reports flipped labels, the size of the changes, and which principles sided with which label.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from align.feedback.agreement import Label, side_of
from align.figures.statistics import Estimate, clustered_share_estimate
from align.results.judged_pairs import Pair


@dataclass(frozen=True)
class Movement:
    """How the labels of `pairs` pairs differ between two labellings.

    `one`, `other` and `both` count the pairs that each labelling and both of them decide. `flipped` is the share of
    `both` that get opposite labels. `change` is the mean of |p' - p| over all pairs; p is 0.5 for an undecided pair.
    Intervals are 95%, over prompts.
    """

    pairs: int
    one: int
    other: int
    both: int
    flipped: Estimate | None
    change: Estimate


@dataclass(frozen=True)
class PrinciplePull:
    """One principle compared with the two labellings.

    `owner` is the constitution that the principle belongs to. `with_a` and `with_b` are the shares of pairs on which
    the principle agrees with A's and with B's label, among the pairs that both decide. `to_a` and `to_b` count the
    flipped pairs on which the principle sides with A's label and with B's.
    """

    owner: str
    principle: str
    decided: int
    with_a: float | None
    with_b: float | None
    to_a: int
    to_b: int


@dataclass(frozen=True)
class SharedPrinciple:
    """A principle that both constitutions have: how the labels it gives alone move from A's text to B's."""

    principle: str
    movement: Movement


def label_movement(pairs: Sequence[Pair], one: Sequence[Label], other: Sequence[Label], seed: int = 0) -> Movement:
    """How the pairs' labels differ; there must be at least one pair."""
    sides = [(before.side, after.side) for before, after in zip(one, other, strict=True)]
    both = [index for index, (x, y) in enumerate(sides) if x and y]
    flips = [float(sides[index][0] != sides[index][1]) for index in both]
    changes = [abs(after.p_a_or_half - before.p_a_or_half) for before, after in zip(one, other, strict=True)]
    prompts = [pair.prompt_id for pair in pairs]
    return Movement(
        pairs=len(pairs),
        one=sum(x != 0 for x, _ in sides),
        other=sum(y != 0 for _, y in sides),
        both=len(both),
        flipped=clustered_share_estimate(flips, [prompts[index] for index in both], seed) if both else None,
        change=clustered_share_estimate(changes, prompts, seed),
    )


def moved_beyond(moved: Movement, null: Movement) -> bool:
    """Whether the interval of the flipped share lies wholly above the null's."""
    return bool(moved.flipped and null.flipped and moved.flipped.low > null.flipped.high)


def principle_pulls(one: Sequence[Label], other: Sequence[Label]) -> list[PrinciplePull]:
    """Every principle of A, then of B, compared with both labellings."""
    return [
        _pull(owner, name, [label.by_principle.get(name) for label in labels], one, other)
        for owner, labels in (("A", one), ("B", other))
        for name in dict.fromkeys(name for label in labels for name in label.by_principle)
    ]


def shared_principles(
    pairs: Sequence[Pair], one: Sequence[Label], other: Sequence[Label], seed: int = 0
) -> list[SharedPrinciple]:
    """The principles whose id both constitutions have, each on the pairs that it judged in both."""
    first = dict.fromkeys(name for label in one for name in label.by_principle)
    found = []
    for name in first:
        labelled = zip(pairs, one, other, strict=True)
        rows = [row for row in labelled if name in row[1].by_principle and name in row[2].by_principle]
        if rows:
            own = [(_label_by(before, name), _label_by(after, name)) for _, before, after in rows]
            moved = label_movement([pair for pair, _, _ in rows], [a for a, _ in own], [b for _, b in own], seed)
            found.append(SharedPrinciple(name, moved))
    return found


def largest_changes(one: Sequence[Label], other: Sequence[Label], count: int) -> list[int]:
    """Indices of the pairs whose probability changes most, the largest change first; unchanged pairs are left out."""
    changes = [abs(after.p_a_or_half - before.p_a_or_half) for before, after in zip(one, other, strict=True)]
    order = sorted(range(len(changes)), key=lambda index: -changes[index])
    return [index for index in order[:count] if changes[index] > 0]


def _label_by(label: Label, name: str) -> Label:
    p = label.by_principle[name]
    return Label(p if side_of(p) else None, {})


def _pull(
    owner: str, name: str, own: Sequence[float | None], one: Sequence[Label], other: Sequence[Label]
) -> PrinciplePull:
    rows = [(side_of(p), before.side, after.side) for p, before, after in zip(own, one, other, strict=True)]
    decided = [row for row in rows if row[0]]
    flipped = [row for row in decided if row[1] * row[2] < 0]
    to_a, to_b = (sum(row[0] == row[side] for row in flipped) for side in (1, 2))
    return PrinciplePull(owner, name, len(decided), _agreement(decided, 1), _agreement(decided, 2), to_a, to_b)


def _agreement(rows: Sequence[tuple[int, int, int]], labelling: int) -> float | None:
    """How often a principle (item 0 of a row) sides with a labelling (item 1 or 2), of the pairs that both decide."""
    agrees = [row[0] == row[labelling] for row in rows if row[labelling]]
    return sum(agrees) / len(agrees) if agrees else None
