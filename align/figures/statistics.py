"""Confidence intervals for reported figures, and calibration metrics. Imports nothing heavier than numpy."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

from align.figures.student import student_quantile

_DRAWN_AT_ONCE = 4_000_000
"""The most indices in memory while resampling, which bounds memory for any number of values and resamples."""


@dataclass(frozen=True)
class Estimate:
    """A mean of `n` values with its confidence interval."""

    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class ReliabilityBin:
    """Predictions in (low, high], in the first bin also at its lower edge, and the share that came true."""

    low: float
    high: float
    count: int
    mean_probability: float
    share: float


def wilson_interval(successes: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Score interval of a share (Wilson 1927), which is valid at 0 and 1 too; (0, 1) where n is 0.

    Raises:
        ValueError: successes are outside [0, n], or confidence is outside (0, 1).
    """
    if not 0 <= successes <= n:
        raise ValueError(f"successes must lie in [0, {n}], got {successes}")
    _check_confidence(confidence)
    return _wilson(successes / n, n, confidence) if n else (0.0, 1.0)


def _wilson(share: float, n: float, confidence: float) -> tuple[float, float]:
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * (share * (1 - share) / n + z**2 / (4 * n**2)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


def clustered_wilson_estimate(values: ArrayLike, clusters: Sequence[str], confidence: float = 0.95) -> Estimate:
    """A share with Wilson's interval, widened where values of a cluster (such as one prompt's pairs) are correlated.

    n is divided by the design effect (Kish 1965), the ratio of the share's variance over clusters to its binomial
    variance, but never by less than 1. Since few clusters say little about that variance, n is also multiplied by
    (t of n − 1 / t of C − 1 degrees of freedom)², with C clusters (Korn and Graubard 1998). With one value per cluster,
    the interval is Wilson's; with copies of a value in each cluster, it is Wilson's for one value per cluster.

    Args:
        values: (N,) in [0, 1].
        clusters: (N,) the name of each value's cluster.

    Raises:
        ValueError: there are no values, values outside [0, 1], or not as many cluster names as values.
    """
    sample, place = _clustered(values, clusters)
    mean, n = float(sample.mean()), len(sample)
    binomial = n * mean * (1 - mean)
    count = int(place.max()) + 1
    between = float((np.bincount(place, weights=sample - mean) ** 2).sum())
    if binomial == 0 or count == 1:  # without variance to compare, each cluster counts once
        return Estimate(mean, *_wilson(mean, count, confidence), n)
    independent = n / max(1.0, between / binomial)
    effect = max(1.0, between / binomial * count / (count - 1) * (n - 1) / n)  # both variances without their bias
    certain = n / effect * (student_quantile(confidence, n - 1) / student_quantile(confidence, count - 1)) ** 2
    # Even if its values are copies, each cluster is worth one value.
    return Estimate(mean, *_wilson(mean, max(certain, min(independent, count)), confidence), n)


def bootstrap_interval(
    values: ArrayLike, seed: int, resamples: int = 2000, confidence: float = 0.95
) -> tuple[float, float]:
    """Bootstrap interval of the mean (Efron 1979). The same seed gives the same interval.

    Its percentiles are expanded for small samples (`_percentile_interval`).

    Args:
        values: (N,) finite numbers, at least one.

    Raises:
        ValueError: there are no values or no resamples, a value is not finite, or confidence is outside (0, 1).
    """
    sample = _vector(values)
    if resamples < 1:
        raise ValueError(f"resamples must be 1 or more, got {resamples}")
    means = np.concatenate([sample[rows].mean(axis=1) for rows in _resamples(len(sample), seed, resamples)])
    return _percentile_interval(means, confidence, len(sample))


def mean_estimate(values: ArrayLike, seed: int, resamples: int = 2000, confidence: float = 0.95) -> Estimate:
    """The mean with its bootstrap interval."""
    sample = _vector(values)
    return Estimate(float(sample.mean()), *bootstrap_interval(sample, seed, resamples, confidence), len(sample))


def share_estimate(values: ArrayLike, seed: int, resamples: int = 2000, confidence: float = 0.95) -> Estimate:
    """The mean of values in [0, 1] with its bootstrap interval or, where all are equal, Wilson's (see `_bounded`).

    Raises:
        ValueError: a value is outside [0, 1], or as for `bootstrap_interval`.
    """
    return _bounded(_vector(values), 0, 1, seed, resamples, confidence)


def clustered_share_estimate(
    values: ArrayLike, clusters: Sequence[str], seed: int, resamples: int = 2000, confidence: float = 0.95
) -> Estimate:
    """`share_estimate` of values that are correlated within clusters, such as one prompt's pairs.

    The bootstrap resamples whole clusters and takes the mean over their values (Field and Welsh 2007). Where all
    clusters have the same mean, resampling shows no spread, and the interval is that of `_bounded` for one value per
    cluster.

    Args:
        values: (N,) in [0, 1].
        clusters: (N,) the name of each value's cluster.

    Raises:
        ValueError: there are not as many cluster names as values, or as for `share_estimate`.
    """
    sample, place = _clustered(values, clusters)
    sums, sizes = np.bincount(place, weights=sample), np.bincount(place)
    means = sums / sizes
    if means.min() == means.max():
        return replace(_bounded(means, 0, 1, seed, resamples, confidence), n=len(sample))
    drawn = _resamples(len(sums), seed, resamples)
    resampled = np.concatenate([sums[rows].sum(axis=1) / sizes[rows].sum(axis=1) for rows in drawn])
    return Estimate(float(sample.mean()), *_percentile_interval(resampled, confidence, len(sums)), len(sample))


def paired_difference(
    first: ArrayLike, second: ArrayLike, seed: int, resamples: int = 2000, confidence: float = 0.95
) -> Estimate:
    """The mean of first - second with its bootstrap interval, which resamples pairs.

    Raises:
        ValueError: the lengths differ, or as for `bootstrap_interval`.
    """
    return mean_estimate(_differences(first, second), seed, resamples, confidence)


def paired_share_difference(
    first: ArrayLike, second: ArrayLike, seed: int, resamples: int = 2000, confidence: float = 0.95
) -> Estimate:
    """`paired_difference` of values in [0, 1], whose interval is never a point (see `_bounded`).

    Raises:
        ValueError: a value is outside [0, 1], or as for `paired_difference`.
    """
    for values in (first, second):
        _check_within(_vector(values), 0, 1)
    return _bounded(_differences(first, second), -1, 1, seed, resamples, confidence)


def reliability_bins(
    probabilities: ArrayLike, outcomes: ArrayLike, bins: int | Sequence[float] = 10
) -> list[ReliabilityBin]:
    """The non-empty bins of predictions (Guo et al. 2017, section 2).

    Args:
        probabilities: (N,) predicted, in [0, 1].
        outcomes: (N,) what happened: 0, 1, or a soft label between.
        bins: the number of bins of equal width, or rising edges. Values outside the edges go into the nearest bin.

    Raises:
        ValueError: the lengths differ, there are no values or no bins, or values are outside [0, 1].
    """
    predicted, happened = _vector(probabilities), _vector(outcomes)
    if len(predicted) != len(happened):
        raise ValueError(f"each probability needs an outcome, got {len(predicted)} and {len(happened)}")
    _check_within(predicted, 0, 1)
    _check_within(happened, 0, 1)
    edges = np.arange(bins + 1) / bins if isinstance(bins, int) else np.asarray(bins, dtype=np.float64)
    if len(edges) < 2 or (np.diff(edges) <= 0).any():
        raise ValueError(f"bins must be 1 or more, or a list of rising edges, got {bins}")
    places = np.clip(np.searchsorted(edges, predicted, side="left") - 1, 0, len(edges) - 2)
    return [
        ReliabilityBin(
            low=float(edges[place]),
            high=float(edges[place + 1]),
            count=int((places == place).sum()),
            mean_probability=float(predicted[places == place].mean()),
            share=float(happened[places == place].mean()),
        )
        for place in range(len(edges) - 1)
        if (places == place).any()
    ]


def expected_calibration_error(
    probabilities: ArrayLike, outcomes: ArrayLike, bins: int | Sequence[float] = 10
) -> float:
    """The mean gap of predicted and observed shares, weighted by bin (Naeini et al. 2015; Guo et al. 2017, eq. 3)."""
    filled = reliability_bins(probabilities, outcomes, bins)
    total = sum(each.count for each in filled)
    return sum(each.count * abs(each.share - each.mean_probability) for each in filled) / total


def _bounded(
    sample: NDArray[np.float64], lower: float, upper: float, seed: int, resamples: int, confidence: float
) -> Estimate:
    """The mean of values in [lower, upper] with an interval that is never a point.

    Resampling equal values, say 30 of them, shows no spread and would claim certainty. By Wilson's interval for 0 of
    30, up to a share u of all values may differ from those seen, and may lie at either end of the range. For 30
    successes of 30, the result is Wilson's interval.
    """
    _check_within(sample, lower, upper)
    if sample.min() < sample.max():
        return mean_estimate(sample, seed, resamples, confidence)
    mean, unseen = float(sample[0]), wilson_interval(0, len(sample), confidence)[1]
    return Estimate(mean, mean - unseen * (mean - lower), mean + unseen * (upper - mean), len(sample))


def _differences(first: ArrayLike, second: ArrayLike) -> NDArray[np.float64]:
    a, b = _vector(first), _vector(second)
    if len(a) != len(b):
        raise ValueError(f"pairs need as many first values as second values, got {len(a)} and {len(b)}")
    return a - b


def _clustered(values: ArrayLike, clusters: Sequence[str]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """(N,) values in [0, 1], and (N,) the index of each value's cluster."""
    sample = _vector(values)
    _check_within(sample, 0, 1)
    if len(clusters) != len(sample):
        raise ValueError(f"each value needs a cluster, got {len(sample)} values and {len(clusters)} clusters")
    return sample, np.unique(np.asarray(clusters), return_inverse=True)[1]


def _check_within(sample: NDArray[np.float64], lower: float, upper: float) -> None:
    if sample.min() < lower or sample.max() > upper:
        raise ValueError(f"values must lie in [{lower}, {upper}], got {sample.min():g} to {sample.max():g}")


def _percentile_interval(means: NDArray[np.float64], confidence: float, count: int) -> tuple[float, float]:
    """The interval of resampled means of `count` values, with expanded percentiles (Hesterberg 2015, section 4.1.3).

    Means of few values vary less over resamples than over samples, and normal quantiles are less than Student's. The
    percentiles are those at which a normal distribution, so corrected, ends the t interval.
    """
    _check_confidence(confidence)
    outside = 0.5 - confidence / 2
    if count > 1:
        outside = NormalDist().cdf(-sqrt(count / (count - 1)) * student_quantile(confidence, count - 1))
    low, high = np.quantile(means, [outside, 1 - outside])
    return float(low), float(high)


def _resamples(count: int, seed: int, resamples: int) -> Iterator[NDArray[np.int64]]:
    """Indices drawn with replacement, (resamples, count) in chunks that fit in memory."""
    generator = np.random.default_rng(seed)
    at_once = max(1, _DRAWN_AT_ONCE // count)
    for start in range(0, resamples, at_once):
        yield generator.integers(count, size=(min(at_once, resamples - start), count))


def _vector(values: ArrayLike | Sequence[float]) -> NDArray[np.float64]:
    vector = np.asarray(values, dtype=np.float64)
    if vector.ndim != 1 or len(vector) == 0:
        raise ValueError(f"expected a list of one or more numbers, got shape {vector.shape}")
    if not np.isfinite(vector).all():
        raise ValueError("every value must be finite")
    return vector


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie in (0, 1), got {confidence}")
