"""Where the principles of a constitution agree and where they conflict, over pairs that a judge has labelled.

Bai et al. 2022 (section 6.1) leave open how principles relate to each other. Two principles agree on a pair where both
prefer the same completion; they are in conflict where both are clear and prefer opposite ones.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from align.settings.blocks import JudgeBlock

TIE_MARGIN = 0.02
"""A probability no further from one half than this prefers neither completion; the judge's own default."""
CLEAR_MARGIN = 0.1
"""A preference is clear where its probability is further from one half than this; see `margins_of`."""

COUNTED = ("judged", "decided", "alike", "opposed", "won")

Counts = tuple[tuple[int, ...], ...]
Shares = tuple[tuple[float | None, ...], ...]


def side_of(p: float | None, margin: float = TIE_MARGIN) -> int:
    """1 for A, -1 for B, 0 for neither."""
    if p is None or abs(p - 0.5) <= margin:
        return 0
    return 1 if p > 0.5 else -1


def margins_of(block: JudgeBlock) -> tuple[float, float]:
    """How far from one half a judge's probabilities are a preference, and a clear one.

    A clamp, or the range after a chain of thought, may hold them closer to one half than `CLEAR_MARGIN`: then half of
    the way that they can go is clear, or no two principles would ever be in conflict.
    """
    bounds = (block.clamp, block.chain_of_thought_range[0]) if block.chain_of_thought else (block.clamp,)
    return block.min_margin, max(block.min_margin, min(CLEAR_MARGIN, (0.5 - max(bounds)) / 2))


@dataclass(frozen=True)
class Label:
    """One pair's label: the probability that A is better, as a whole (None: undecided) and by principle."""

    p_a: float | None
    by_principle: Mapping[str, float]

    @property
    def or_half(self) -> float:
        return 0.5 if self.p_a is None else self.p_a

    @property
    def side(self) -> int:
        return side_of(self.p_a, 0.0)


@dataclass(frozen=True)
class Agreement:
    """Square matrices over `principles`, in their order; row and column are principles.

    `judged` counts the pairs of completions that both gave an opinion on, `decided` those on which both prefer a
    completion, `alike` those of them on which it is the same one, `opposed` those on which both are clear and prefer
    different ones. `won[i][j]` counts the opposed on which the whole constitution sided with principle i against j.
    """

    principles: tuple[str, ...]
    judged: Counts
    decided: Counts
    alike: Counts
    opposed: Counts
    won: Counts

    @property
    def agreement(self) -> Shares:
        """Share of the pairs that both decide on which they prefer the same completion; None where there is none."""
        return _shares(self.alike, self.decided)

    @property
    def conflict(self) -> Shares:
        """Share of the pairs that both judged on which they are clear and opposed; None where there is none."""
        return _shares(self.opposed, self.judged)

    def as_json(self) -> dict[str, Any]:
        """The matrices and what they count, for a file."""
        counts = {name: getattr(self, name) for name in COUNTED}
        return {"principles": self.principles, "agreement": self.agreement, "conflict": self.conflict, **counts}


class AgreementTally:
    """Counts how each two of the principles relate, one labelled pair at a time."""

    def __init__(
        self, principles: Sequence[str], tie_margin: float = TIE_MARGIN, clear_margin: float = CLEAR_MARGIN
    ) -> None:
        self._place = {name: number for number, name in enumerate(principles)}
        self._margins = tie_margin, clear_margin
        self._counts = {name: [[0] * len(self._place) for _ in self._place] for name in COUNTED}

    def add(self, label: Label) -> None:
        """A pair's label."""
        counts, (tie_margin, clear_margin) = self._counts, self._margins
        given = [
            (self._place[name], side_of(p, tie_margin), side_of(p, clear_margin))
            for name, p in label.by_principle.items()
            if name in self._place
        ]
        for (i, side, clear), (j, other_side, other_clear) in itertools.product(given, repeat=2):
            is_opposed = clear * other_clear < 0
            counts["judged"][i][j] += 1
            counts["decided"][i][j] += side * other_side != 0
            counts["alike"][i][j] += side * other_side > 0
            counts["opposed"][i][j] += is_opposed
            counts["won"][i][j] += is_opposed and clear == label.side

    def agreement(self) -> Agreement:
        """What the labels so far say."""
        return Agreement(tuple(self._place), **{name: tuple(map(tuple, rows)) for name, rows in self._counts.items()})


def agreement_between(
    principles: Sequence[str],
    labels: Iterable[Label],
    tie_margin: float = TIE_MARGIN,
    clear_margin: float = CLEAR_MARGIN,
) -> Agreement:
    """How each two of the principles relate over the labelled pairs."""
    tally = AgreementTally(principles, tie_margin, clear_margin)
    for label in labels:
        tally.add(label)
    return tally.agreement()


def agreement_figures(found: Agreement) -> dict[str, dict[str, float]]:
    """For a manifest: agreement and conflict of each two principles that judged pairs together, by `one × other`."""
    figures = {}
    for i, one in enumerate(found.principles):
        for j, other in enumerate(found.principles[:i]):
            shares = {"agreement": found.agreement[i][j], "conflict": found.conflict[i][j]}
            if found.judged[i][j]:
                figures[f"{other} × {one}"] = {name: share for name, share in shares.items() if share is not None}
    return figures


def _shares(counts: Counts, of: Counts) -> Shares:
    return tuple(
        tuple(count / whole if whole else None for count, whole in zip(row, wholes, strict=True))
        for row, wholes in zip(counts, of, strict=True)
    )
