"""Seeds: mean, spread, and differences that are taken seed by seed before anything is said about them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, sqrt
from statistics import fmean, stdev

from syncnorm.tools.common.stats import t_quantile
from syncnorm.tools.study.records import Row, Value


def values(rows: Iterable[Row], measure: str, **condition: Value) -> dict[int, float]:
    """Seed -> value of the rows of ``measure`` whose condition has at least these values."""
    return {
        row.seed: row.value
        for row in rows
        if row.measure == measure and all(row.condition.get(key) == value for key, value in condition.items())
    }


def levels(rows: Iterable[Row], key: str) -> list[Value]:
    """The values that ``key`` takes in the conditions, in the order in which they first come."""
    return list(dict.fromkeys(row.condition[key] for row in rows if key in row.condition))


def spread(sample: Sequence[float]) -> float:
    """Standard deviation over seeds (n - 1); 0 of a single one."""
    return stdev(sample) if len(sample) > 1 else 0.0


@dataclass(frozen=True)
class Difference:
    """``a - b``, seed by seed.

    Attributes:
        by_seed: one difference a seed that both have.
    """

    by_seed: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return fmean(self.by_seed)

    @property
    def error(self) -> float:
        """Standard error of the mean; infinite for a single seed, which has none."""
        return spread(self.by_seed) / sqrt(len(self.by_seed)) if len(self.by_seed) > 1 else inf

    @property
    def agreed(self) -> int:
        """1 or -1 where the seeds agree that a is larger or smaller than b, else 0.

        They agree where all have that sign, and the mean's interval of 95 % (Student's t, which is wide for few
        seeds: 4.3 standard errors for three) leaves zero out.
        """
        if len(self.by_seed) < 2:
            return 0
        sign = 1 if self.mean > 0 else -1
        reach = t_quantile(len(self.by_seed) - 1) * self.error
        return sign if all(d * sign > 0 for d in self.by_seed) and abs(self.mean) > reach else 0

    def points(self, signed: bool = True) -> str:
        """Mean and standard error in percentage points: ``+1.2 ± 0.3``; its size alone where not ``signed``."""
        size = f"{100 * self.mean:+.1f}" if signed else f"{100 * abs(self.mean):.1f}"
        return f"{size} ± {100 * self.error:.1f}"


def difference(a: Mapping[int, float], b: Mapping[int, float]) -> Difference:
    """Of two `values`, over the seeds that both have.

    Raises:
        ValueError: none.
    """
    seeds = sorted(a.keys() & b.keys())
    if not seeds:
        raise ValueError("no seed has both")
    return Difference(tuple(a[seed] - b[seed] for seed in seeds))
