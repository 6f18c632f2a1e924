"""Statistics of times: quartiles, and ratios of repetitions."""

from __future__ import annotations

from collections.abc import Sequence
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
