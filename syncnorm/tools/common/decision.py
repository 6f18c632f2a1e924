"""Is one arm better than another? The one rule by which `compare` and `study` judge their results.

Both arms are trained with the same seeds and tested on the same samples, so every difference is paired by seed and
by sample. Seeds and samples are both drawn from larger populations, and each has noise of its own: another seed
trains other weights, another test set has other hard samples. The interval contains both.

1. Results between 0 and 1, such as accuracies, are compared by their log-odds, on which the noise of the seeds is
   about the same at 60 % as at 98 %. Other results are compared as they are.
2. The mean over the seeds has the variance ``between_seeds``; its interval is Student's.
3. The mean over the samples has the variance ``between_samples``: that of the samples' mean differences, with one
   more sample for each arm that only this arm gets right (Bonett and Price). Without it, four samples of a hundred
   would decide, which McNemar's exact test does not allow.
4. The residual of the two-way layout is part of both, and is subtracted once. The half-widths of the independent
   parts are added in squares (MOVER).

The interval always contains the mean of the seeds' differences, which log-odds do not ensure if some seeds failed to
train. The sentence follows from the interval alone: it excludes zero, or it is within the margin of equivalence on
both sides (two one-sided tests), or nothing is decided.

Sources: Clark, "The language-as-fixed-effect fallacy", 1973 (two crossed samples); Owen, "The pigeonhole bootstrap",
2007; Bonett and Price, "Adjusted Wald confidence interval for a difference of binomial proportions based on paired
data", 2012; Zou and Donner, "Construction of confidence limits about effect measures: a general approach", 2008;
Schuirmann, 1987 (two one-sided tests); Lan and DeMets, "Discrete sequential boundaries for clinical trials", 1983.

Shapes: S = seeds, U = units, which are test samples, or groups of them if a metric has no value for one sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import exp, inf, isfinite, log, sqrt
from statistics import fmean
from typing import Literal

import torch
from torch import Tensor

# Of a decision that is wrong: "better" or "worse" without a difference, "equivalent" beyond the margin.
LEVEL = 0.05
# In percentage points, for results between 0 and 1.
DEFAULT_MARGIN_POINTS = 0.5
# In percent of the other arm's result, for other metrics.
DEFAULT_MARGIN_PERCENT = 2.0
# Forecasts end here.
MAX_SEEDS = 100
MAX_SAMPLES = 10_000_000

Kind = Literal["better", "worse", "equivalent", "undecided"]


@dataclass(frozen=True)
class Scores:
    """The test results of one arm.

    Attributes:
        by_seed: a result for each seed.
        units_SU: the values of the units, whose mean over the units is about the seed's result; ``None`` if they are
            not known.
        num_samples: size of the test set.
    """

    by_seed: tuple[float, ...]
    units_SU: Tensor | None
    num_samples: int


@dataclass(frozen=True)
class Rule:
    """How results are judged.

    Attributes:
        share: whether results are between 0 and 1: differences are then in percentage points.
        higher_is_better: the direction.
        margin: the largest difference that does not matter: in percentage points, or, for other metrics, in percent
            of the other arm's mean result; ``None`` for `DEFAULT_MARGIN_POINTS` or `DEFAULT_MARGIN_PERCENT`.
        level: probability of a wrong decision that is accepted.
    """

    share: bool = True
    higher_is_better: bool = True
    margin: float | None = None
    level: float = LEVEL

    def decide(self, ours: Scores, other: Scores) -> Difference:
        """``ours - other``, positive if ours is better.

        Raises:
            ValueError: the two do not have the same seeds, or none, or a result is not finite.
        """
        if not ours.by_seed or len(ours.by_seed) != len(other.by_seed):
            raise ValueError(f"expected results of the same seeds, got {len(ours.by_seed)} and {len(other.by_seed)}")
        if not all(isfinite(result) for result in (*ours.by_seed, *other.by_seed)):
            raise ValueError(f"expected finite results, got {ours.by_seed} and {other.by_seed}")
        if self.margin is not None:
            margin = self.margin if self.share else abs(fmean(other.by_seed)) * self.margin / 100
        elif self.share:
            margin = DEFAULT_MARGIN_POINTS
        else:
            margin = abs(fmean(other.by_seed)) * DEFAULT_MARGIN_PERCENT / 100
        scale = _LogOdds.of(ours, other) if self.share else _Plain(1.0 if self.higher_is_better else -1.0)
        if self.share and not self.higher_is_better:
            ours, other = other, ours
        pairs = list(zip(ours.by_seed, other.by_seed, strict=True))
        moved = [scale.difference(a, b) for a, b in pairs]
        spread = _Spread.of(moved, _unit_moments(ours, other, self.share), scale.slope, len(pairs), ours.num_samples)
        sign = 100.0 if self.share else 1.0 if self.higher_is_better else -1.0
        by_seed = tuple(sign * (a - b) for a, b in pairs)
        return _difference(by_seed, fmean(moved), spread, scale, margin, self.level)


@dataclass(frozen=True)
class Difference:
    """How much better one arm is than another; positive is better. In percentage points, or in units of the metric.

    Attributes:
        by_seed: the difference for each seed.
        low: lower end of the ``1 - level`` confidence interval; infinite with one seed.
        high: its upper end.
        margin: differences up to this one do not matter.
        level: see `Rule`.
        more_seeds: how many more seeds would decide if mean and spread stay as they are; 0 if it is decided, ``None``
            if no number of seeds would.
        more_samples: how many more test samples would, with the same seeds; 0 and ``None`` as for the seeds.
    """

    by_seed: tuple[float, ...]
    low: float
    high: float
    margin: float
    level: float
    more_seeds: int | None
    more_samples: int | None

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return fmean(self.by_seed)

    @property
    def kind(self) -> Kind:
        """What the interval says; nothing else enters the decision."""
        return _kind(self.low, self.high, self.margin)


def level_of_look(look: int) -> float:
    """The level of the ``look``-th (from 1) of several looks at growing data: 5 % / 2, 5 % / 4, ...

    Whoever adds seeds until the interval decides has several chances of a wrong decision. The levels of all looks add
    up to `LEVEL`.
    """
    return LEVEL * 0.5**look


def _kind(low: float, high: float, margin: float) -> Kind:
    if low > 0:
        return "better"
    if high < 0:
        return "worse"
    return "equivalent" if -margin <= low and high <= margin else "undecided"


class _Plain:
    """Results as they are, in units of the metric."""

    def __init__(self, sign: float) -> None:
        self._sign = sign
        self.slope = sign

    def difference(self, ours: float, other: float) -> float:
        return self._sign * (ours - other)

    def shown(self, difference: float) -> float:
        return difference


@dataclass(frozen=True)
class _LogOdds:
    """Log-odds of a share of ``num_samples``, with half a sample added on both sides, so that 0 and 1 are finite.

    Attributes:
        middle: between the log-odds of the two arms' mean results.
        slope: difference of log-odds per difference of shares, between the two means.
    """

    num_samples: int
    middle: float
    slope: float

    @classmethod
    def of(cls, ours: Scores, other: Scores) -> _LogOdds:
        n, a, b = ours.num_samples, fmean(ours.by_seed), fmean(other.by_seed)
        odds_a, odds_b = _log_odds(a, n), _log_odds(b, n)
        middle = (odds_a + odds_b) / 2
        share = 1 / (1 + exp(-middle))
        slope = (odds_a - odds_b) / (a - b) if abs(a - b) > 1e-9 else 1 / (share * (1 - share))
        return cls(n, middle, slope)

    def difference(self, ours: float, other: float) -> float:
        return _log_odds(ours, self.num_samples) - _log_odds(other, self.num_samples)

    def shown(self, difference: float) -> float:
        """The difference of log-odds in percentage points, at the level of the two arms."""
        if abs(difference) == inf:
            return difference
        return 100 * (_share(self.middle + difference / 2) - _share(self.middle - difference / 2))


def _log_odds(share: float, num_samples: int) -> float:
    smoothed = (share * num_samples + 0.5) / (num_samples + 1)
    return log(smoothed / (1 - smoothed))


def _share(log_odds: float) -> float:
    return 1 / (1 + exp(-log_odds)) if log_odds > -700 else 0.0


@dataclass(frozen=True)
class _UnitMoments:
    """Variances of a mean difference, in units of the metric.

    Attributes:
        between: of the mean over units, residual included.
        residual: of the mean over seeds and units, of what neither a seed nor a unit explains.
        degrees: of freedom of ``between``.
    """

    between: float
    residual: float
    degrees: int


def _unit_moments(ours: Scores, other: Scores, share: bool) -> _UnitMoments:
    """From the units that both arms have; else, for shares, that of two independent binomials.

    The latter is more if both arms find the same samples hard. Other results without units vary by seed only.
    """
    if ours.units_SU is None or other.units_SU is None or ours.units_SU.shape != other.units_SU.shape:
        n = ours.num_samples
        smoothed = [(fmean(each.by_seed) * n + 1) / (n + 2) for each in (ours, other)] if share else []
        return _UnitMoments(sum(p * (1 - p) for p in smoothed) / (n + 2), 0.0, max(1, n - 1))
    d_SU = ours.units_SU.double() - other.units_SU.double()
    S, U = d_SU.shape
    if U < 2:
        return _UnitMoments(inf, 0.0, 1)
    mean_U, mean_S, mean = d_SU.mean(0), d_SU.mean(1), d_SU.mean()
    squares = float((mean_U - mean).square().sum())
    size = _size_of_an_error(torch.stack((ours.units_SU, other.units_SU)))
    # One more sample for each arm; of a whole test set's result, each sample is about 1 / num_samples.
    if size is not None:
        between = (squares + 2 * size**2) / (U + 2) ** 2
    else:
        between = squares / (U - 1) / U + (2 / (ours.num_samples + 2) ** 2 if share else 0.0)
    if S < 2:
        return _UnitMoments(between, 0.0, U - 1)
    residual_SU = d_SU - mean_S.unsqueeze(1) - mean_U + mean
    return _UnitMoments(between, float(residual_SU.square().sum()) / ((S - 1) * (U - 1)) / (S * U), U - 1)


def _size_of_an_error(values: Tensor) -> float | None:
    """1 if every sample is right (1) or wrong (0), also by a metric that does not say so; 100 if it is in percent."""
    return next((right for right in (1.0, 100.0) if bool(((values == 0) | (values == right)).all())), None)


@dataclass(frozen=True)
class _Spread:
    """Variances on the scale of the decision, from which the interval for any number of seeds and samples follows."""

    per_seed: float
    between_samples: float
    residual: float
    degrees: int
    seeds: int
    samples: int

    @classmethod
    def of(cls, moved: Sequence[float], units: _UnitMoments, slope: float, seeds: int, samples: int) -> _Spread:
        # Not statistics.variance, which raises where the square of a huge loss overflows.
        per_seed = float(torch.tensor(moved, dtype=torch.float64).var()) if seeds > 1 else inf
        between, residual = units.between * slope**2, units.residual * slope**2
        return cls(per_seed, between, residual, units.degrees, seeds, samples)

    def half_width(self, level: float, seeds: int, samples: int) -> float:
        """Of the interval that ``seeds`` and ``samples`` would give."""
        if seeds < 2:
            return inf
        fewer = self.samples / samples
        own_samples = max(0.0, self.between_samples - self.residual) * fewer
        residual = self.residual * fewer * self.seeds / seeds
        between_seeds = self.per_seed / seeds
        t_seeds = _t(level, seeds - 1)
        t_samples = _t(level, self.degrees * samples / self.samples)
        independent = sqrt(t_seeds**2 * between_seeds + t_samples**2 * own_samples)
        return max(independent, t_samples * sqrt(own_samples + residual))


@lru_cache(maxsize=1024)
def _t(level: float, degrees: float) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(degrees, 1 - level / 2))


def _difference(
    by_seed: tuple[float, ...], moved: float, spread: _Spread, scale: _Plain | _LogOdds, margin: float, level: float
) -> Difference:
    mean = fmean(by_seed)

    def interval(seeds: int, samples: int) -> tuple[float, float]:
        half = spread.half_width(level, seeds, samples)
        return min(mean, scale.shown(moved - half)), max(mean, scale.shown(moved + half))

    def kind(seeds: int, samples: int) -> Kind:
        return _kind(*interval(seeds, samples), margin)

    seeds, samples = spread.seeds, spread.samples
    more_seeds: int | None = 0
    more_samples: int | None = 0
    if kind(seeds, samples) == "undecided":
        enough = range(max(2, seeds + 1), MAX_SEEDS + 1)
        more_seeds = next((s - seeds for s in enough if kind(s, samples) != "undecided"), None)
        more_samples = _first_enough(lambda n: kind(seeds, n) != "undecided", samples)
    return Difference(by_seed, *interval(seeds, samples), margin, level, more_seeds, more_samples)


def _first_enough(decides: Callable[[int], bool], samples: int) -> int | None:
    """How many more than ``samples`` are the first that decide, to two digits; ``None`` above `MAX_SAMPLES`."""
    low, high = samples, samples
    while not decides(high):
        low, high = high, 2 * high
        if high > MAX_SAMPLES:
            return None
    while high - low > max(1, high // 50):
        middle = (low + high) // 2
        low, high = (low, middle) if decides(middle) else (middle, high)
    return high - samples
