"""Over-optimisation of a reward: best-of-n by order statistics, and the scaling laws of Gao et al. 2022.

d is the square root of the KL to the SFT policy, in nats. R is a mean reward minus the SFT policy's, in standard
deviations of the SFT policy's rewards. The proxy reward is optimised; the gold reward is what the proxy stands for.

Shapes: P prompts, N completions of each by the SFT policy, K points of a curve. The first point is the SFT policy.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
REWARDS = ("proxy", "gold")
MAX_EXPONENT = 700
"""The exponential of a slightly larger number overflows a float."""
MAX_DRAWS_PER_RESAMPLE = 10
"""If more draws than this are needed for a resample that can be fitted, there are too few prompts."""


def best_of_kl(n: int) -> float:
    """log n − (n − 1)/n: an upper bound, in nats, of the KL from best-of-n to the policy that it samples from.

    Stiennon et al. 2020 and Gao et al. 2022 take it for the KL itself. It is a tight bound if the policy rarely gives
    the same completion twice (Beirami et al. 2024, arXiv 2401.01879, section 3).
    """
    return math.log(n) - (n - 1) / n


def expected_best_of(proxy: Array, values: Array, n: int) -> Array:
    """(P,) the expected value of the completion with the highest proxy among n of a prompt's N completions.

    This is the mean over all subsets of size n, an unbiased estimate from N ≥ n draws (Nakano et al. 2021, appendix I):
    the i-th smallest completion is the best of C(i − 1, n − 1) of the C(N, n) subsets. Ties are broken evenly.

    Args:
        proxy: (P, N) rewards by which completions are chosen.
        values: (P, N) rewards whose expectation is wanted: the proxy itself, or the gold reward.

    Raises:
        ValueError: n is not in [1, N].
    """
    size = proxy.shape[1]
    if not 1 <= n <= size:
        raise ValueError(f"n must be from 1 to {size}, the number of completions per prompt, got {n}")
    weights = np.array([math.comb(rank, n - 1) / math.comb(size, n) for rank in range(size)])
    return np.array([_sorted_by_proxy(*row) @ weights for row in zip(proxy, values, strict=True)])


def _sorted_by_proxy(proxy: Array, values: Array) -> Array:
    """(N,) one prompt's values in ascending order of their proxies. Values with equal proxies become their mean."""
    _, places, counts = np.unique(proxy, return_inverse=True, return_counts=True)
    return np.repeat(np.bincount(places, weights=values) / counts, counts)


@dataclass(frozen=True)
class Points:
    """K points of a curve: KL to the SFT policy in nats, and proxy and gold as R. Points not measured are NaN."""

    kl: Array
    proxy: Array
    gold: Array

    @property
    def d(self) -> Array:
        """(K,) square roots of the KL. A negative estimate of the KL counts as zero."""
        return np.sqrt(np.maximum(self.kl, 0))

    @property
    def rewards(self) -> Array:
        """(K, 2) proxy and gold."""
        return np.stack([self.proxy, self.gold], axis=1)


@dataclass(frozen=True)
class PromptSums:
    """Each prompt's part of each point, (P, K) each: the number of completions and their sums of KL, proxy and gold."""

    count: Array
    kl: Array
    proxy: Array
    gold: Array

    def points(self, weights: Array, deviations: Mapping[str, float]) -> Points:
        """The curve with each prompt counted `weights` (P,) times. `deviations` are the standard deviations in R."""
        counts = weights @ self.count
        counts = np.where(counts > 0, counts, np.nan)
        kl, proxy, gold = ((weights @ each) / counts for each in (self.kl, self.proxy, self.gold))
        return Points(kl, (proxy - proxy[0]) / deviations["proxy"], (gold - gold[0]) / deviations["gold"])

    def all_points(self, deviations: Mapping[str, float]) -> Points:
        """The curve of all prompts."""
        return self.points(np.ones(len(self.count)), deviations)


def doubling_sizes(largest: int) -> list[int]:
    """1, 2, 4 and so on up to `largest`, and `largest` itself."""
    return [*(2**power for power in range(largest.bit_length()) if 2**power < largest), largest]


def best_of_sums(proxy: Array, gold: Array, sizes: Sequence[int]) -> PromptSums:
    """The curve of best-of-n by the proxy, with a point for each n in `sizes`, from (P, N) rewards."""
    columns = [np.stack([expected_best_of(proxy, values, n) for n in sizes], axis=1) for values in (proxy, gold)]
    ones = np.ones_like(columns[0])
    return PromptSums(ones, ones * [best_of_kl(n) for n in sizes], *columns)


def rollout_sums(prompts: Sequence[str], iterations: Sequence[int], kl: Array, proxy: Array, gold: Array) -> PromptSums:
    """The curve of training, with a point per iteration in ascending order. Arguments have one entry per rollout."""
    names, rows = np.unique(prompts, return_inverse=True)
    steps, columns = np.unique(iterations, return_inverse=True)
    tables = np.zeros((4, len(names), len(steps)))
    for table, values in zip(tables, (np.ones_like(kl), kl, proxy, gold), strict=True):
        np.add.at(table, (rows, columns), values)
    return PromptSums(*tables)


@dataclass(frozen=True)
class Law:
    """R(d) = α d − β penalty(d), linear in α and β. `peak` gives the d where R is highest, for β above 0."""

    formula: str
    penalty: Callable[[Array], Array]
    peak: Callable[[float, float], float]

    def at(self, d: Array, alpha: float, beta: float) -> Array:
        return alpha * d - beta * self.penalty(d)


def _d_log_d(d: Array) -> Array:
    return d * np.log(np.where(d > 0, d, 1.0))


def _rl_peak(alpha: float, beta: float) -> float:
    exponent = alpha / beta - 1
    return math.exp(exponent) if exponent < MAX_EXPONENT else math.inf


# Gao et al. 2022, arXiv 2210.10760, section 1
BEST_OF_N_LAW = Law("d (α − β d)", np.square, lambda alpha, beta: max(alpha / (2 * beta), 0.0))
RL_LAW = Law("d (α − β log d)", _d_log_d, _rl_peak)


@dataclass(frozen=True)
class Coefficient:
    """A fitted coefficient and its 95% interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Fit:
    """A law fitted to the proxy or gold of a curve.

    `r_squared` is 1 − (residual sum of squares) / (sum of squares about the mean): below 0 if the mean fits better.
    `peak` is the d where the law is highest, or None if it rises without end.
    """

    alpha: Coefficient
    beta: Coefficient
    r_squared: float
    peak: float | None


def least_squares(law: Law, points: Points) -> Array:
    """(2, 2) fitted coefficients: the rows are α and β, the columns proxy and gold. Points not measured are left out.

    Raises:
        ValueError: fewer than two different KL are above 0, so that α and β are not determined.
    """
    measured = np.isfinite(points.kl)
    d = points.d[measured]
    terms = np.stack([d, -law.penalty(d)], axis=1)  # (measured, 2)
    coefficients, _, rank, _ = np.linalg.lstsq(terms, points.rewards[measured], rcond=None)
    if rank < 2:
        raise ValueError("a curve needs two or more points away from the SFT policy, at different KL")
    return np.asarray(coefficients)


def fit_curve(
    law: Law, sums: PromptSums, deviations: Mapping[str, float], seed: int, resamples: int = 2000
) -> dict[str, Fit]:
    """The law fitted to proxy and to gold, with percentile intervals from resampling the prompts (Efron 1979).

    Only the prompts are resampled. The deviations are held fixed, and the variation between training seeds is not seen.

    Raises:
        ValueError: as for `least_squares`, or there are too few prompts to resample.
    """
    points = sums.all_points(deviations)
    fitted = least_squares(law, points)
    low, high = np.quantile(_resampled_fits(law, sums, deviations, seed, resamples), [0.025, 0.975], axis=0)
    fits = {}
    for column, name in enumerate(REWARDS):
        coefficients = zip(*(each[:, column].tolist() for each in (fitted, low, high)), strict=True)
        fits[name] = _fit(law, points.d, points.rewards[:, column], *(Coefficient(*each) for each in coefficients))
    return fits


def _fit(law: Law, d: Array, reward: Array, alpha: Coefficient, beta: Coefficient) -> Fit:
    residuals, centred = reward - law.at(d, alpha.value, beta.value), reward - reward.mean()
    peak = law.peak(alpha.value, beta.value) if beta.value > 0 else math.inf
    r_squared = float(1 - residuals @ residuals / (centred @ centred))
    return Fit(alpha, beta, r_squared, peak if math.isfinite(peak) else None)


def _resampled_fits(
    law: Law, sums: PromptSums, deviations: Mapping[str, float], seed: int, resamples: int
) -> list[Array]:
    """Fits to prompts drawn with replacement. Draws that leave too few points, or no SFT policy, are drawn again."""
    generator = np.random.default_rng(seed)
    prompts = len(sums.count)
    fits: list[Array] = []
    for _ in range(MAX_DRAWS_PER_RESAMPLE * resamples):
        weights = generator.multinomial(prompts, np.full(prompts, 1 / prompts)).astype(float)
        points = sums.points(weights, deviations)
        if np.isfinite(points.kl[0]):
            with suppress(ValueError):
                fits.append(least_squares(law, points))
        if len(fits) == resamples:
            return fits
    raise ValueError(f"{prompts} prompts are too few to resample")
