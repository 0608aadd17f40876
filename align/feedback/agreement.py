"""Where the principles of a constitution agree and where they conflict, over pairs that a judge has labelled.

Bai et al. 2022 (section 6.1) leave open how principles relate to each other. Two principles agree on a pair where both
prefer the same completion; they are in conflict where both are clear and prefer opposite ones.
"""

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
    rows = [(_side(label.p_a, 0.0), label.by_principle) for label in labels]
    sides = [{name: _side(p, tie_margin) for name, p in given.items()} for _, given in rows]
    clear = [{name: _side(p, clear_margin) for name, p in given.items()} for _, given in rows]
    whole = [side for side, _ in rows]

    def count(matching: Any) -> Counts:
        return tuple(tuple(matching(one, other) for other in principles) for one in principles)

    return Agreement(
        tuple(principles),
        judged=count(lambda i, j: sum(i in each and j in each for each in sides)),
        decided=count(lambda i, j: sum(bool(each.get(i) and each.get(j)) for each in sides)),
        alike=count(lambda i, j: sum(each.get(i, 0) * each.get(j, 0) > 0 for each in sides)),
        opposed=count(lambda i, j: sum(_opposed(each, i, j) for each in clear)),
        won=count(
            lambda i, j: sum(_opposed(each, i, j) and each[i] == side for each, side in zip(clear, whole, strict=True))
        ),
    )


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


def _opposed(sides: Mapping[str, int], one: str, other: str) -> bool:
    return sides.get(one, 0) * sides.get(other, 0) < 0


def _shares(counts: Counts, of: Counts) -> Shares:
    return tuple(
        tuple(count / whole if whole else None for count, whole in zip(row, wholes, strict=True))
        for row, wholes in zip(counts, of, strict=True)
    )
