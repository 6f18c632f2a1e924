"""Differences between the test results of two arms, paired by seed, and whether they are significant."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from statistics import mean

from syncnorm.tools.common.stats import NORMAL_QUANTILE, PairedDifference
from syncnorm.tools.compare.records import ArmResult, Comparison

# A loss has no binomial noise. Arms whose losses differ by less than this share count as equivalent.
LOSS_MARGIN = 0.02
# In percentage points. Two arms are not called equivalent by a test set with a coarser resolution than this.
MAX_RESOLUTION = 10.0


@dataclass(frozen=True)
class ResultDifference(PairedDifference):
    """How much better one arm is than another; positive is better, for accuracy as well as loss.

    Attributes:
        by_seed: in percentage points of accuracy, or in units of the loss.
        resolution: the smallest difference that the test set can confirm, with any number of seeds: 95 % of the
            binomial noise of the difference, as if the errors of the two arms were independent, which is an upper
            bound; for a loss a share of the other arm's.
        metric: ``"accuracy"`` or ``"loss"``.
    """

    resolution: float
    metric: str

    @property
    def enough_seeds(self) -> bool:
        """A single seed has no interval."""
        return len(self.by_seed) > 1

    @property
    def significant(self) -> bool:
        """Larger than the noise of the seeds and of the test set."""
        return self.enough_seeds and abs(self.mean) > max(self.half_width, self.resolution)

    @property
    def underpowered(self) -> bool:
        """The test set is so small that it can confirm only a large difference."""
        return self.metric == "accuracy" and self.resolution > MAX_RESOLUTION and not self.significant

    @property
    def equivalent(self) -> bool:
        """An equivalence test: the interval lies within the resolution of the test set, if that is fine enough."""
        return self.enough_seeds and not self.underpowered and abs(self.mean) + self.half_width <= self.resolution

    @property
    def below_resolution(self) -> bool:
        """The seeds agree on a difference that the test set cannot confirm."""
        return self.half_width < abs(self.mean) <= self.resolution and not self.equivalent


def difference(comparison: Comparison, arm: ArmResult, other: ArmResult) -> ResultDifference | None:
    """``arm - other``; ``None`` if one of them did not run, or ended with a loss that is not finite.

    Source: the paired t-test; the variance of a difference of two binomial proportions, with one success and one
    failure added (Agresti and Caffo, 2000), so that a perfect score has a variance as well.
    """
    metric = comparison.task.metric
    results, others = arm.results(metric), other.results(metric)
    pairs = [(a, b) for a, b in zip(results, others, strict=False) if a is not None and b is not None]
    if not pairs or len(pairs) != len(results) or len(results) != len(others):
        return None
    scale = 100.0 if metric == "accuracy" else -1.0
    if metric == "accuracy":
        variances = [_binomial_variance(mean(side), comparison.task.num_test) for side in zip(*pairs, strict=True)]
        resolution = 100 * NORMAL_QUANTILE * sqrt(sum(variances))
    else:
        resolution = LOSS_MARGIN * mean(abs(b) for _, b in pairs)
    return ResultDifference(tuple(scale * (a - b) for a, b in pairs), resolution, metric)


def _binomial_variance(share: float, samples: int) -> float:
    smoothed = (share * samples + 1) / (samples + 2)
    return smoothed * (1 - smoothed) / (samples + 2)
