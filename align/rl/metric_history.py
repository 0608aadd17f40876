"""The figures of a run so far, row by row as in `metrics.jsonl`, and what is made of several: pure functions."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

Row = Mapping[str, Any]
"""An iteration's figures by name, and its number as `step`; a figure that was not finite is None."""
History = Sequence[Row]
KL = "kl_to_reference_k1"
"""The figure that is meant by the KL to the reference: what the penalty in the reward is for."""


def values(rows: History, name: str) -> list[float]:
    """A figure's values in the rows that have it."""
    return [row[name] for row in rows if row.get(name) is not None]


def moving_means(history: History, name: str, window: int) -> dict[int, float]:
    """By iteration, a figure's mean over the `window` iterations up to it; from the first that has so many."""
    rows = [row for row in history if row.get(name) is not None]
    ends = range(window, len(rows) + 1)
    return {rows[end - 1]["step"]: fmean(values(rows[end - window : end], name)) for end in ends}


def length_controlled_score(history: History, window: int) -> float:
    """What the newest iteration's mean score would be if completions were still as long as in the first iteration.

    c_t = c_{t−1} + (s_t − s_{t−1}) − β_t (l_t − l_{t−1}), c_1 = s_1: the change of the mean score s, less what that of
    the mean length l brings. With one β for the whole run this is the adjusted mean of an analysis of covariance
    (Cochran 1957, Biometrics 13); with β_t a step in length counts as much as length did at the time. β_t is the
    least-squares slope of score on length within iterations, pooled over the last `window`, so that a policy that
    becomes better and longer at once is not held to owe the one to the other:
    β = Σ Sxy / Σ Sxx = Σ slope · std² / Σ std², as every iteration has equally many completions.

    Each row has `score`, `completion_length`, `completion_length_std` and `score_length_slope`, all but the newest
    `score_length_controlled`. That learned rewards follow length is what Singhal et al. 2023 (arXiv 2310.03716) found.
    """
    newest = history[-1]
    if len(history) == 1:
        return float(newest["score"])
    before = history[-2]
    variances = [deviation**2 for deviation in values(history[-window:], "completion_length_std")]
    slopes = values(history[-window:], "score_length_slope")
    weighed = sum(slope * variance for slope, variance in zip(slopes, variances, strict=True))
    slope = weighed / sum(variances) if sum(variances) else 0.0
    change = newest["score"] - before["score"] - slope * (newest["completion_length"] - before["completion_length"])
    return float(before["score_length_controlled"] + change)
