"""How the labels of the same pairs move when the constitution changes: flips, size, who pulls where."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from align.feedback.agreement import Label, side_of
from align.figures.statistics import Estimate, clustered_share_estimate
from align.records import Conversation


@dataclass(frozen=True)
class Pair:
    """Two completions of a prompt; `prompt_id` groups the pairs of one prompt. `a_preferred`: people chose A."""

    id: str
    prompt_id: str
    prompt: Conversation
    a: str
    b: str
    category: str = ""
    a_preferred: bool | None = None


@dataclass(frozen=True)
class Movement:
    """From one labelling of `pairs` pairs to another.

    `flipped`: of the pairs that both decide (`both`), the share whose sides are opposite. `change`: mean of |p' - p|
    over all pairs, an undecided one counting as one half. Intervals are 95%, over prompts. `one`, `other`: how many
    pairs each labelling decides.
    """

    pairs: int
    one: int
    other: int
    both: int
    flipped: Estimate | None
    change: Estimate


@dataclass(frozen=True)
class PrinciplePull:
    """One principle beside the two labellings.

    `with_a`, `with_b`: of the pairs that the principle and the labelling decide, the share on the same side. On the
    pairs that flip, `to_a` and `to_b` count those on which the principle sides with A's label and with B's.
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
    """A principle of both constitutions, judged by itself: how its own labels move from A's text to B's."""

    principle: str
    movement: Movement


def movement(pairs: Sequence[Pair], one: Sequence[Label], other: Sequence[Label], seed: int = 0) -> Movement:
    """How the pairs' labels move; there must be at least one pair."""
    sides = [(before.side, after.side) for before, after in zip(one, other, strict=True)]
    both = [place for place, (x, y) in enumerate(sides) if x and y]
    flips = [float(sides[place][0] != sides[place][1]) for place in both]
    changes = [abs(after.p_a_or_half - before.p_a_or_half) for before, after in zip(one, other, strict=True)]
    prompts = [pair.prompt_id for pair in pairs]
    return Movement(
        pairs=len(pairs),
        one=sum(x != 0 for x, _ in sides),
        other=sum(y != 0 for _, y in sides),
        both=len(both),
        flipped=clustered_share_estimate(flips, [prompts[place] for place in both], seed) if both else None,
        change=clustered_share_estimate(changes, prompts, seed),
    )


def beyond(moved: Movement, null: Movement) -> bool:
    """Whether the flips' whole interval lies above the null's interval."""
    return bool(moved.flipped and null.flipped and moved.flipped.low > null.flipped.high)


def pulls(one: Sequence[Label], other: Sequence[Label]) -> list[PrinciplePull]:
    """Every principle of A, then of B, beside both labellings."""
    return [
        _pull(owner, name, [label.by_principle.get(name) for label in labels], one, other)
        for owner, labels in (("A", one), ("B", other))
        for name in dict.fromkeys(name for label in labels for name in label.by_principle)
    ]


def shared_principles(
    pairs: Sequence[Pair], one: Sequence[Label], other: Sequence[Label], seed: int = 0
) -> list[SharedPrinciple]:
    """The principles that both constitutions have under one id, each on the pairs that it judged in both."""
    first = dict.fromkeys(name for label in one for name in label.by_principle)
    found = []
    for name in first:
        rows = [
            row
            for row in zip(pairs, one, other, strict=True)
            if name in row[1].by_principle and name in row[2].by_principle
        ]
        if rows:
            own = [(_alone(before, name), _alone(after, name)) for _, before, after in rows]
            moved = movement([pair for pair, _, _ in rows], [a for a, _ in own], [b for _, b in own], seed)
            found.append(SharedPrinciple(name, moved))
    return found


def largest(one: Sequence[Label], other: Sequence[Label], count: int) -> list[int]:
    """Places of the pairs whose probability moves most, the largest first; those that don't move are left out."""
    changes = [abs(after.p_a_or_half - before.p_a_or_half) for before, after in zip(one, other, strict=True)]
    order = sorted(range(len(changes)), key=lambda place: -changes[place])
    return [place for place in order[:count] if changes[place] > 0]


def _alone(label: Label, name: str) -> Label:
    p = label.by_principle[name]
    return Label(p if side_of(p) else None, {})


def _pull(
    owner: str, name: str, own: Sequence[float | None], one: Sequence[Label], other: Sequence[Label]
) -> PrinciplePull:
    rows = [(side_of(p), before.side, after.side) for p, before, after in zip(own, one, other, strict=True)]
    decided = [row for row in rows if row[0]]
    flipped = [row for row in decided if row[1] * row[2] < 0]
    return PrinciplePull(
        owner,
        name,
        len(decided),
        _share(decided, lambda row: row[1]),
        _share(decided, lambda row: row[2]),
        sum(row[0] == row[1] for row in flipped),
        sum(row[0] == row[2] for row in flipped),
    )


def _share(rows: Sequence[tuple[int, int, int]], side: Callable[[tuple[int, int, int]], int]) -> float | None:
    known = [row for row in rows if side(row)]
    return sum(row[0] == side(row) for row in known) / len(known) if known else None
