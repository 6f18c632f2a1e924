"""Differences between two arms, paired by seed, and what chance alone can do to them. Pure functions."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from statistics import mean, stdev

from syncnorm.tools.common.stats import t_quantile
from syncnorm.tools.compare.records import ArmResult, Comparison

_NORMAL = 1.960
# A loss has no binomial noise: differences below this share of it count as none.
LOSS_MARGIN = 0.02
# A test set that cannot tell this many points from none is no ground to call two arms equal.
COARSEST = 10.0


@dataclass(frozen=True)
class Difference:
    """How much better one arm is than another; positive is better, for accuracy and for loss alike.

    Attributes:
        of_seed: for each seed; in points (percent of the test samples), or of the loss.
        mean: over the seeds.
        half_width: of the 95 % interval of the mean over seeds: t-quantile times standard error. Infinite for one.
        resolution: below this the test set itself cannot tell arms apart, however many seeds: 95 % of the binomial
            noise of the difference, as if the two arms were right on samples of their own, which is the most it can
            be; for a loss a share of the other arm's.
        metric: ``"accuracy"`` or ``"loss"``.
    """

    of_seed: tuple[float, ...]
    mean: float
    half_width: float
    resolution: float
    metric: str

    @property
    def enough_seeds(self) -> bool:
        """One seed tells nothing about chance."""
        return len(self.of_seed) > 1

    @property
    def is_real(self) -> bool:
        """Beyond chance of the seeds and of the test set."""
        return self.enough_seeds and abs(self.mean) > max(self.half_width, self.resolution)

    @property
    def is_blind(self) -> bool:
        """The test set is so small that only a large difference could be told from none."""
        return self.metric == "accuracy" and self.resolution > COARSEST and not self.is_real

    @property
    def is_none(self) -> bool:
        """The interval has no room for a difference that the test set could show, if it can show one."""
        return self.enough_seeds and not self.is_blind and abs(self.mean) + self.half_width <= self.resolution

    @property
    def is_too_small(self) -> bool:
        """The seeds agree on a difference that the test set cannot confirm."""
        return self.half_width < abs(self.mean) <= self.resolution and not self.is_none


def difference(comparison: Comparison, arm: ArmResult, other: ArmResult) -> Difference | None:
    """``arm`` less ``other``; ``None`` where one did not run, or ended with a loss that is not finite.

    Source: the paired t-test; the variance of a difference of two binomial shares, with one success and one failure
    added (Agresti and Caffo, 2000), so that a perfect score is not noiseless.
    """
    metric = comparison.task.metric
    ours, theirs = arm.results(metric), other.results(metric)
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=False) if a is not None and b is not None]
    if not pairs or len(pairs) != len(ours) or len(ours) != len(theirs):
        return None
    scale = 100.0 if metric == "accuracy" else -1.0
    of_seed = tuple(scale * (a - b) for a, b in pairs)
    n = len(of_seed)
    half_width = float("inf") if n == 1 else t_quantile(n - 1) * stdev(of_seed) / sqrt(n)
    if metric == "accuracy":
        variances = [_binomial(mean(side), comparison.task.num_test) for side in zip(*pairs, strict=True)]
        resolution = 100 * _NORMAL * sqrt(sum(variances))
    else:
        resolution = LOSS_MARGIN * mean(abs(b) for _, b in pairs)
    return Difference(of_seed, mean(of_seed), half_width, resolution, metric)


def _binomial(share: float, samples: int) -> float:
    smoothed = (share * samples + 1) / (samples + 2)
    return smoothed * (1 - smoothed) / (samples + 2)
