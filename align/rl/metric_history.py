"""The history of a run's figures, and statistics over several iterations: pure functions of rows of `metrics.jsonl`."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

Row = Mapping[str, Any]
"""An iteration's figures by name, and its number as `step`; figures that are not finite are None."""
History = Sequence[Row]
KL = "kl_to_reference_k1"
"""The figure that alarms and early stopping read as the KL to the reference."""


def values(rows: History, name: str) -> list[float]:
    """The values of a figure in the rows that have it."""
    return [row[name] for row in rows if row.get(name) is not None]


def moving_means(history: History, name: str, window: int) -> dict[int, float]:
    """By iteration, a figure's mean over the last `window` iterations; only iterations with a full window."""
    rows = [row for row in history if row.get(name) is not None]
    ends = range(window, len(rows) + 1)
    return {rows[end - 1]["step"]: fmean(values(rows[end - window : end], name)) for end in ends}


def length_controlled_score(history: History, window: int) -> float:
    """The newest iteration's mean score, had the mean completion length stayed that of the first iteration.

    c_t = c_{t−1} + (s_t − s_{t−1}) − β_t (l_t − l_{t−1}), c_1 = s_1: the change of the mean score s, minus the part
    that the change of the mean length l explains. With one β for the whole run this is the adjusted mean of an analysis
    of covariance (Cochran 1957, Biometrics 13); β_t weights each change in length by what length was worth at the time.

    β_t is the least-squares slope of score on length within iterations, pooled over the last `window`:
    β = Σ Sxy / Σ Sxx = Σ slope · std² / Σ std², as every iteration has equally many completions. Because
    it is measured within iterations, an improvement of the policy that coincides with growing length does not bias it.

    Learned rewards tend to follow length (Singhal et al. 2023, arXiv 2310.03716).

    Args:
        history: rows with `score`, `completion_length`, `completion_length_std` and `score_length_slope`; all but the
            newest also with `score_length_controlled`.
    """
    newest = history[-1]
    if len(history) == 1:
        return float(newest["score"])
    before = history[-2]
    variances = [deviation**2 for deviation in values(history[-window:], "completion_length_std")]
    slopes = values(history[-window:], "score_length_slope")
    covariance = sum(slope * variance for slope, variance in zip(slopes, variances, strict=True))
    slope = covariance / sum(variances) if sum(variances) else 0.0
    change = newest["score"] - before["score"] - slope * (newest["completion_length"] - before["completion_length"])
    return float(before["score_length_controlled"] + change)
