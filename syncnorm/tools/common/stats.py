"""Statistics that several commands use: quartiles and ratios of times, differences paired by seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb, inf, sqrt
from statistics import fmean, median, quantiles, stdev

# Two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom. For a few seeds they are far above 1.96.
_T = [
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
]
NORMAL_QUANTILE = 1.960  # the limit for many degrees of freedom


def t_quantile(degrees: int) -> float:
    """The two-sided 95 % quantile of Student's t distribution for ``degrees`` degrees of freedom."""
    return _T[degrees - 1] if degrees <= len(_T) else NORMAL_QUANTILE


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


@dataclass(frozen=True)
class PairedDifference:
    """The difference ``a - b`` for each seed that both were run with.

    Source: the paired t-test.
    """

    by_seed: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return fmean(self.by_seed)

    @property
    def std_error(self) -> float:
        """Standard error of the mean; infinite for a single seed."""
        return stdev(self.by_seed) / sqrt(len(self.by_seed)) if len(self.by_seed) > 1 else inf

    @property
    def half_width(self) -> float:
        """Half the width of the mean's 95 % confidence interval; infinite for a single seed."""
        return t_quantile(len(self.by_seed) - 1) * self.std_error if len(self.by_seed) > 1 else inf
