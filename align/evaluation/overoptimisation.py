"""Over-optimisation of a reward: best-of-n by order statistics, and the curves that Gao et al. 2022 fit.

d is the square root of the KL to the SFT policy in nats; R is a mean reward less the SFT policy's, in standard
deviations of the SFT policy's rewards. The proxy is what is optimised, the gold what it stands for.

Shapes: P prompts, N completions of each by the SFT policy, K points of a curve, the first of which is the SFT policy.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
REWARDS = ("proxy", "gold")
LARGEST_EXPONENT = 700
"""Floating-point numbers end a little above the exponential of this."""
PATIENCE = 10
"""Draws for each resample that is wanted: where most leave nothing to fit, there are too few prompts."""


def best_of_kl(n: int) -> float:
    """log n − (n − 1)/n: at most so far, in nats, is best-of-n from the policy that it draws from.

    Long taken for the KL itself (Stiennon et al. 2020; Gao et al. 2022), it is an upper bound, and a near one where
    completions are seldom alike (Beirami et al. 2024, arXiv 2401.01879, section 3).
    """
    return math.log(n) - (n - 1) / n


def expected_best_of(proxy: Array, values: Array, n: int) -> Array:
    """(P,) the expected value of the completion whose proxy is highest among n of a prompt's N.

    The mean over all subsets of n, an unbiased estimate from N ≥ n draws (Nakano et al. 2021, appendix I): the i-th
    smallest is the best of C(i − 1, n − 1) of the C(N, n) subsets. Among equal proxies each is as likely to be taken.

    Args:
        proxy: (P, N) what completions are chosen by.
        values: (P, N) what is expected: the proxy itself, or the gold reward.

    Raises:
        ValueError: n is not in [1, N].
    """
    size = proxy.shape[1]
    if not 1 <= n <= size:
        raise ValueError(f"the best of {n} needs from 1 to {size} of the completions there are")
    shares = np.array([math.comb(rank, n - 1) / math.comb(size, n) for rank in range(size)])
    return np.array([_in_order(*row) @ shares for row in zip(proxy, values, strict=True)])


def _in_order(proxy: Array, values: Array) -> Array:
    """(N,) one prompt's values in ascending order of its proxies, those of equal proxies replaced by their mean."""
    _, places, counts = np.unique(proxy, return_inverse=True, return_counts=True)
    return np.repeat(np.bincount(places, weights=values) / counts, counts)


@dataclass(frozen=True)
class Points:
    """K points of a curve: KL to the SFT policy in nats, proxy and gold on the scale of R; NaN where not measured."""

    kl: Array
    proxy: Array
    gold: Array

    @property
    def d(self) -> Array:
        """(K,) square roots of the KL; an estimate below zero counts as zero."""
        return np.sqrt(np.maximum(self.kl, 0))

    @property
    def rewards(self) -> Array:
        """(K, 2) proxy and gold."""
        return np.stack([self.proxy, self.gold], axis=1)


@dataclass(frozen=True)
class Tally:
    """What each prompt adds to each point, (P, K) each: completions, and over these the sums of KL, proxy and gold."""

    count: Array
    kl: Array
    proxy: Array
    gold: Array

    def points(self, weights: Array, deviations: Mapping[str, float]) -> Points:
        """The curve where each prompt counts `weights` (P,) times, on the scale of R by the rewards' deviations."""
        counts = weights @ self.count
        counts = np.where(counts > 0, counts, np.nan)
        kl, proxy, gold = ((weights @ sums) / counts for sums in (self.kl, self.proxy, self.gold))
        return Points(kl, (proxy - proxy[0]) / deviations["proxy"], (gold - gold[0]) / deviations["gold"])

    def all_points(self, deviations: Mapping[str, float]) -> Points:
        """The curve of all prompts."""
        return self.points(np.ones(len(self.count)), deviations)


def doubling_sizes(most: int) -> list[int]:
    """1, 2, 4 and so on, and the most."""
    return [*(2**power for power in range(most.bit_length()) if 2**power < most), most]


def best_of_tally(proxy: Array, gold: Array, sizes: Sequence[int]) -> Tally:
    """The curve of best-of-n by the proxy, for each n of `sizes`, from (P, N) rewards."""
    columns = [np.stack([expected_best_of(proxy, values, n) for n in sizes], axis=1) for values in (proxy, gold)]
    ones = np.ones_like(columns[0])
    return Tally(ones, ones * [best_of_kl(n) for n in sizes], *columns)


def rollout_tally(prompts: Sequence[str], iterations: Sequence[int], kl: Array, proxy: Array, gold: Array) -> Tally:
    """The curve of training, a point an iteration in ascending order, from a row a completion."""
    (names, rows), (clock, columns) = (np.unique(each, return_inverse=True) for each in (prompts, iterations))
    tables = np.zeros((4, len(names), len(clock)))
    for table, values in zip(tables, (np.ones_like(kl), kl, proxy, gold), strict=True):
        np.add.at(table, (rows, columns), values)
    return Tally(*tables)


@dataclass(frozen=True)
class Law:
    """R(d) = α d − β bend(d), linear in α and β; `peak` is the d where it is highest, for β above 0."""

    formula: str
    bend: Callable[[Array], Array]
    peak: Callable[[float, float], float]

    def at(self, d: Array, alpha: float, beta: float) -> Array:
        return alpha * d - beta * self.bend(d)


def _d_log_d(d: Array) -> Array:
    return d * np.log(np.where(d > 0, d, 1.0))


def _rl_peak(alpha: float, beta: float) -> float:
    exponent = alpha / beta - 1
    return math.exp(exponent) if exponent < LARGEST_EXPONENT else math.inf


# Gao et al. 2022, arXiv 2210.10760, section 1.
BEST_OF_N_LAW = Law("d (α − β d)", np.square, lambda alpha, beta: max(alpha / (2 * beta), 0.0))
RL_LAW = Law("d (α − β log d)", _d_log_d, _rl_peak)


@dataclass(frozen=True)
class Coefficient:
    """A fitted number and its 95% interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Fit:
    """A law fitted to a curve's proxy or gold.

    `r_squared` is 1 − (squares left) / (squares about the points' mean), below 0 where that mean fits better; `peak` is
    the d where the law is highest, None where it rises for ever.
    """

    alpha: Coefficient
    beta: Coefficient
    r_squared: float
    peak: float | None


def least_squares(law: Law, points: Points) -> Array:
    """(2, 2) α and β of proxy and of gold: rows are α and β, columns proxy and gold. Points not measured are left out.

    Raises:
        ValueError: fewer than two different KL above 0, which leave α or β open.
    """
    measured = np.isfinite(points.kl)
    d = points.d[measured]
    terms = np.stack([d, -law.bend(d)], axis=1)  # (measured, 2)
    coefficients, _, rank, _ = np.linalg.lstsq(terms, points.rewards[measured], rcond=None)
    if rank < 2:
        raise ValueError("a curve needs two or more points away from the SFT policy, at different KL")
    return np.asarray(coefficients)


def fit_curve(
    law: Law, tally: Tally, deviations: Mapping[str, float], seed: int, resamples: int = 2000
) -> dict[str, Fit]:
    """The law fitted to proxy and to gold, with percentile intervals from resampling the prompts (Efron 1979).

    The deviations stay as they are while prompts are resampled; so does the run, which another seed would change.

    Raises:
        ValueError: as for `least_squares`, or there are too few prompts to resample.
    """
    points = tally.all_points(deviations)
    found = least_squares(law, points)
    low, high = np.quantile(_resampled_fits(law, tally, deviations, seed, resamples), [0.025, 0.975], axis=0)
    fits = {}
    for column, name in enumerate(REWARDS):
        coefficients = zip(*(each[:, column].tolist() for each in (found, low, high)), strict=True)
        fits[name] = _fit(law, points.d, points.rewards[:, column], *(Coefficient(*each) for each in coefficients))
    return fits


def _fit(law: Law, d: Array, reward: Array, alpha: Coefficient, beta: Coefficient) -> Fit:
    left, spread = reward - law.at(d, alpha.value, beta.value), reward - reward.mean()
    peak = law.peak(alpha.value, beta.value) if beta.value > 0 else math.inf
    return Fit(alpha, beta, float(1 - left @ left / (spread @ spread)), peak if math.isfinite(peak) else None)


def _resampled_fits(law: Law, tally: Tally, deviations: Mapping[str, float], seed: int, resamples: int) -> list[Array]:
    """Fits to as many prompts drawn with replacement; what leaves too few points, or no SFT policy, is drawn again."""
    generator = np.random.default_rng(seed)
    prompts = len(tally.count)
    fits: list[Array] = []
    for _ in range(PATIENCE * resamples):
        weights = generator.multinomial(prompts, np.full(prompts, 1 / prompts)).astype(float)
        points = tally.points(weights, deviations)
        if np.isfinite(points.kl[0]):
            with suppress(ValueError):
                fits.append(least_squares(law, points))
        if len(fits) == resamples:
            return fits
    raise ValueError(f"{prompts} prompts are too few to resample")
