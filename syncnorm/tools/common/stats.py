"""Statistics of times: quartiles, and ratios of repetitions."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb
from statistics import median, quantiles


def quartiles(times: Sequence[float]) -> tuple[float, float, float]:
    """(p25, median, p75), interpolated between neighboring values."""
    if len(times) == 1:
        return times[0], times[0], times[0]
    p25, middle, p75 = quantiles(times, n=4, method="inclusive")
    return p25, middle, p75


def median_ratio(ours: Sequence[float], baseline: Sequence[float]) -> float:
    """Median of ours / baseline over the repetitions: what slows a repetition down slows both, and cancels."""
    return median(a / b for a, b in zip(ours, baseline, strict=True))


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % confidence interval of the median: a pair of order statistics, whatever the distribution.

    With fewer than 6 values, the smallest and the largest, whose confidence is lower.

    Source: Conover, "Practical Nonparametric Statistics", 1999, section 3.2.

    Example:
        >>> median_interval([1, 2, 3, 4, 5, 6, 7, 8])
        (1, 8)
    """
    ordered, n = sorted(values), len(values)
    outside = comb(n, 0)  # of the 2**n equally likely orders, those with fewer than ``index + 1`` below the median
    index = 0
    while 2 * (outside + comb(n, index + 1)) <= 0.05 * 2**n:
        index += 1
        outside += comb(n, index)
    return ordered[index], ordered[n - 1 - index]
