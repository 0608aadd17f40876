"""Quantiles of Student's t distribution, without scipy."""

from functools import lru_cache
from math import atan, cos, pi, sin, sqrt


@lru_cache
def student_quantile(confidence: float, degrees: int) -> float:
    """The t that bounds the middle share `confidence` of Student's distribution on both sides.

    Args:
        confidence: in (0, 1).
    """
    low, high = 0.0, 1.0
    while _student_middle(high, degrees) < confidence:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_middle(middle, degrees) < confidence else (low, middle)
    return high


def _student_middle(t: float, degrees: int) -> float:
    """P(|T| < t), in closed form for whole degrees of freedom (Abramowitz and Stegun 1964, 26.7.3 and 26.7.4)."""
    angle = atan(t / sqrt(degrees))
    term, total = (cos(angle), 0.0) if degrees % 2 else (1.0, 0.0)
    for k in range(1, degrees // 2 + 1):
        total += term
        term *= cos(angle) ** 2 * ((2 * k) / (2 * k + 1) if degrees % 2 else (2 * k - 1) / (2 * k))
    return 2 / pi * (angle + sin(angle) * total) if degrees % 2 else sin(angle) * total
