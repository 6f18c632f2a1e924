"""Learning rates, chosen for each contender alike: on images and seeds that the result is not taken from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from syncnorm.tools.study.records import Row, Value
from syncnorm.tools.study.statistics import levels, values

MEASURE = "validation accuracy"
# Seeds of the measured runs count from 0.
FIRST_SEED = 1000


def best_rates(rows: Sequence[Row], key: str) -> dict[Value, float]:
    """For each value of ``key`` the ``lr`` with the best mean validation accuracy; of equals, the smallest."""
    rates = sorted(float(rate) for rate in levels(rows, "lr"))
    best = {}
    for level in levels(rows, key):
        found = {rate: values(rows, MEASURE, **{key: level}, lr=rate) for rate in rates}
        means = {rate: fmean(by_seed.values()) for rate, by_seed in found.items() if by_seed}
        best[level] = max(means, key=lambda rate: means[rate])
    return best


def told(best: Mapping[Value, float]) -> str:
    """The rates for the record's notes."""
    return ", ".join(f"{name} {rate:g}" for name, rate in best.items())
