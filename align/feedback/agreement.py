"""Where the principles of a constitution agree and where they conflict, over pairs that a judge has labelled.

Bai et al. 2022 (section 6.1) leave open how principles relate to each other. Two principles agree on a pair where both
prefer the same completion; they are in conflict where both are clear and prefer opposite ones.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

TIE_MARGIN = 0.02
"""A probability no further from one half than this prefers neither completion; the judge's own default."""
CLEAR_MARGIN = 0.1
"""A preference is clear where its probability is further from one half than this."""

Counts = tuple[tuple[int, ...], ...]
Shares = tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True)
class Labelled:
    """One pair's label: the probability that A is better, as a whole (None: undecided) and by principle."""

    p_a: float | None
    by_principle: Mapping[str, float]


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
        counts = {name: getattr(self, name) for name in ("judged", "decided", "alike", "opposed", "won")}
        return {"principles": self.principles, "agreement": self.agreement, "conflict": self.conflict, **counts}


def agreement_between(
    principles: Sequence[str],
    labels: Iterable[Labelled],
    tie_margin: float = TIE_MARGIN,
    clear_margin: float = CLEAR_MARGIN,
) -> Agreement:
    """How each two of the principles relate over the labelled pairs."""
    place = {name: number for number, name in enumerate(principles)}
    found = {name: [[0] * len(place) for _ in place] for name in ("judged", "decided", "alike", "opposed", "won")}
    for label in labels:
        whole = _side(label.p_a, 0.0)
        given = [
            (place[name], _side(p, tie_margin), _side(p, clear_margin))
            for name, p in label.by_principle.items()
            if name in place
        ]
        for (i, side, clear), (j, other_side, other_clear) in itertools.product(given, repeat=2):
            is_opposed = clear * other_clear < 0
            found["judged"][i][j] += 1
            found["decided"][i][j] += side * other_side != 0
            found["alike"][i][j] += side * other_side > 0
            found["opposed"][i][j] += is_opposed
            found["won"][i][j] += is_opposed and clear == whole
    return Agreement(tuple(principles), **{name: tuple(map(tuple, counts)) for name, counts in found.items()})


def agreement_figures(found: Agreement) -> dict[str, dict[str, float]]:
    """For a manifest: agreement and conflict of each two principles that judged pairs together, by `one × other`."""
    figures = {}
    for i, one in enumerate(found.principles):
        for j, other in enumerate(found.principles[:i]):
            shares = {"agreement": found.agreement[i][j], "conflict": found.conflict[i][j]}
            if found.judged[i][j]:
                figures[f"{other} × {one}"] = {name: share for name, share in shares.items() if share is not None}
    return figures


def _side(p: float | None, margin: float) -> int:
    """1 for A, -1 for B, 0 for neither."""
    if p is None or abs(p - 0.5) <= margin:
        return 0
    return 1 if p > 0.5 else -1


def _shares(counts: Counts, of: Counts) -> Shares:
    return tuple(
        tuple(count / whole if whole else None for count, whole in zip(row, wholes, strict=True))
        for row, wholes in zip(counts, of, strict=True)
    )
