"""What ppo_learning.py concludes from runs: reward at given KL, its spread over seeds, and who is worse where."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
WINDOW = 5
"""Steps in a row that are averaged: one step's mean over its completions is mostly noise."""


@dataclass(frozen=True)
class Curve:
    """A run's mean reward against its KL to the reference, in order of KL."""

    kl: Numbers
    reward: Numbers

    def at(self, levels: Numbers) -> Numbers:
        """(L,) the reward at each KL, on straight lines between points; NaN where the run did not get."""
        return np.interp(levels, self.kl, self.reward, left=np.nan, right=np.nan)


@dataclass(frozen=True)
class Level:
    """Both sides' reward at a KL: mean and standard deviation (the sample's) over the seeds."""

    kl: float
    ours: tuple[float, float]
    theirs: tuple[float, float]

    @property
    def spread(self) -> float:
        """The seeds' standard deviation, pooled over the two sides."""
        return float(np.sqrt((self.ours[1] ** 2 + self.theirs[1] ** 2) / 2))

    @property
    def worse(self) -> bool:
        """Whether ours is below theirs by more than the seeds' spread."""
        return self.ours[0] < self.theirs[0] - self.spread


def reward_curve(kl: Sequence[float], reward: Sequence[float], window: int = WINDOW) -> Curve:
    """The curve of a run's steps, in their order: `window` steps in a row averaged, the averages in order of KL.

    Raises:
        ValueError: fewer steps than the window is wide.
    """
    if len(kl) < window:
        raise ValueError(f"{len(kl)} steps are fewer than the {window} that are averaged")
    kernel = np.full(window, 1 / window)
    smooth_kl, smooth_reward = np.convolve(kl, kernel, "valid"), np.convolve(reward, kernel, "valid")
    order = np.argsort(smooth_kl, kind="stable")
    return Curve(smooth_kl[order], smooth_reward[order])


def shared_levels(curves: Sequence[Curve], count: int = 8) -> Numbers:
    """At most `count` round numbers, evenly apart, that lie within the range of KL of every curve; maybe none."""
    low, high = max(curve.kl[0] for curve in curves), min(curve.kl[-1] for curve in curves)
    if high < low:
        return np.empty(0)
    for step in (factor * 10.0**power for power in range(-4, 4) for factor in (1, 2, 5)):
        levels = np.arange(np.ceil(low / step), np.floor(high / step) + 1) * step
        if len(levels) <= count:
            return levels
    return np.empty(0)


def compare(ours: Sequence[Curve], theirs: Sequence[Curve]) -> list[Level]:
    """Both sides at each KL that every run of both reaches."""
    levels = shared_levels([*ours, *theirs])
    sides = [np.array([curve.at(levels) for curve in side]) for side in (ours, theirs)]
    means, deviations = zip(*(moments(side) for side in sides), strict=True)
    return [
        Level(float(kl), *((float(means[side][i]), float(deviations[side][i])) for side in (0, 1)))
        for i, kl in enumerate(levels)
    ]


def moments(values: Numbers) -> tuple[Numbers, Numbers]:
    """Mean and sample standard deviation over the seeds, the first axis; the deviation of a single one is 0."""
    return values.mean(axis=0), values.std(axis=0, ddof=1) if len(values) > 1 else np.zeros(values.shape[1:])


def verdict(levels: Sequence[Level]) -> str:
    """In words, by the criterion that ours is at no KL worse by more than the seeds' spread."""
    if not levels:
        return "The two sides reach no KL in common: nothing to compare."
    worse = [f"{level.kl:g}" for level in levels if level.worse]
    reached = f"the {len(levels)} levels of KL that every run of both reaches"
    if worse:
        return f"Ours is worse than TRL's by more than the seeds' spread at {', '.join(worse)} nats, of {reached}."
    return f"Ours is no worse than TRL's, within the seeds' spread, at all of {reached}."
