"""Measures where the principles of a constitution agree and where they conflict, on pairs that a judge has labelled.

Bai et al. 2022 (section 6.1) leave open how principles relate to each other. Two principles agree on a pair if both
prefer the same completion. They conflict if both clearly prefer different ones.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from align.settings.blocks import JudgeBlock

TIE_MARGIN = 0.02
"""A probability no further from one half than this is a tie. The default of `judge.min_margin`."""
CLEAR_MARGIN = 0.1
"""A preference is clear if its probability is further from one half than this; see `margins_of`."""

COUNTED = ("judged", "decided", "alike", "opposed", "won")

Counts = tuple[tuple[int, ...], ...]
Shares = tuple[tuple[float | None, ...], ...]


def side_of(p: float | None, margin: float = TIE_MARGIN) -> int:
    """Which completion a probability prefers: 1 for A, -1 for B, 0 for neither."""
    if p is None or abs(p - 0.5) <= margin:
        return 0
    return 1 if p > 0.5 else -1


def margins_of(settings: JudgeBlock) -> tuple[float, float]:
    """How far from one half a judge's probability must be to count as a preference, and as a clear one.

    A clamp, or the range after a chain of thought, may keep probabilities closer to one half than twice `CLEAR_MARGIN`.
    Then a preference is clear halfway to that bound; otherwise principles could hardly ever conflict.
    """
    bounds = (settings.clamp, settings.chain_of_thought_range[0]) if settings.chain_of_thought else (settings.clamp,)
    return settings.min_margin, max(settings.min_margin, min(CLEAR_MARGIN, (0.5 - max(bounds)) / 2))


@dataclass(frozen=True)
class Label:
    """A pair's label: the probability that A is better by the whole constitution (None: undecided) and by principle."""

    p_a: float | None
    by_principle: Mapping[str, float]

    @property
    def p_a_or_half(self) -> float:
        return 0.5 if self.p_a is None else self.p_a

    @property
    def side(self) -> int:
        return side_of(self.p_a, 0.0)


@dataclass(frozen=True)
class Agreement:
    """Square matrices of counts; rows and columns are the `principles`, in their order.

    Each entry counts pairs of completions. `judged`: both principles gave an opinion. `decided`: both prefer a
    completion. `alike`: both prefer the same one. `opposed`: both clearly prefer different ones. `won[i][j]`: of the
    opposed pairs, those on which the whole constitution sided with principle i against j.
    """

    principles: tuple[str, ...]
    judged: Counts
    decided: Counts
    alike: Counts
    opposed: Counts
    won: Counts

    @property
    def agreement(self) -> Shares:
        """Of the pairs that both decide, the share on which they prefer the same completion; None if there are none."""
        return _shares(self.alike, self.decided)

    @property
    def conflict(self) -> Shares:
        """Of the pairs that both judged, the share on which they are opposed; None if there are none."""
        return _shares(self.opposed, self.judged)

    def as_json(self) -> dict[str, Any]:
        """The shares and the counts, for a JSON file."""
        counts = {name: getattr(self, name) for name in COUNTED}
        return {"principles": self.principles, "agreement": self.agreement, "conflict": self.conflict, **counts}


class AgreementTally:
    """Counts how often each two principles agree and conflict, one labelled pair at a time."""

    def __init__(
        self, principles: Sequence[str], tie_margin: float = TIE_MARGIN, clear_margin: float = CLEAR_MARGIN
    ) -> None:
        self._index = {name: number for number, name in enumerate(principles)}
        self._margins = tie_margin, clear_margin
        self._counts = {name: [[0] * len(self._index) for _ in self._index] for name in COUNTED}

    def add(self, label: Label) -> None:
        """Add a pair's label."""
        counts, (tie_margin, clear_margin) = self._counts, self._margins
        given = [
            (self._index[name], side_of(p, tie_margin), side_of(p, clear_margin))
            for name, p in label.by_principle.items()
            if name in self._index
        ]
        for (i, side, clear), (j, other_side, other_clear) in itertools.product(given, repeat=2):
            is_opposed = clear * other_clear < 0
            counts["judged"][i][j] += 1
            counts["decided"][i][j] += side * other_side != 0
            counts["alike"][i][j] += side * other_side > 0
            counts["opposed"][i][j] += is_opposed
            counts["won"][i][j] += is_opposed and clear == label.side

    def agreement(self) -> Agreement:
        """The counts so far."""
        return Agreement(tuple(self._index), **{name: tuple(map(tuple, rows)) for name, rows in self._counts.items()})


def agreement_between(principles: Sequence[str], labels: Iterable[Label], *margins: float) -> Agreement:
    """How often each two principles agree and conflict on the labelled pairs; `margins` as for `AgreementTally`."""
    tally = AgreementTally(principles, *margins)
    for label in labels:
        tally.add(label)
    return tally.agreement()


def agreement_figures(found: Agreement) -> dict[str, dict[str, float]]:
    """Agreement and conflict of each two principles that judged a pair in common, by `one × other`, for a manifest."""
    figures = {}
    for i, one in enumerate(found.principles):
        for j, other in enumerate(found.principles[:i]):
            shares = {"agreement": found.agreement[i][j], "conflict": found.conflict[i][j]}
            if found.judged[i][j]:
                figures[f"{other} × {one}"] = {name: share for name, share in shares.items() if share is not None}
    return figures


def _shares(counts: Counts, totals: Counts) -> Shares:
    return tuple(
        tuple(count / total if total else None for count, total in zip(row, row_totals, strict=True))
        for row, row_totals in zip(counts, totals, strict=True)
    )
