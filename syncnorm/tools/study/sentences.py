"""Findings in words: what the seeds agree on is stated, what they do not agree on is said to be open."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from syncnorm.tools.study.records import Value
from syncnorm.tools.study.statistics import Difference, difference


def percent(by_seed: Mapping[int, float]) -> str:
    """Mean over the seeds: ``97.5 %``."""
    return f"{100 * fmean(by_seed.values()):.1f} %"


def compared(name: str, sample: Mapping[int, float], other_name: str, other: Mapping[int, float]) -> str:
    """One sentence on two `values`, without a capital: the means, the paired difference, whether the seeds agree."""
    apart = difference(sample, other)
    means = f"{name} reaches {percent(sample)} and {other_name} {percent(other)}"
    if not apart.agreed:
        return f"{means}: the seeds do not agree on a difference ({apart.points()} points)."
    return f"{means}: {apart.points(signed=False)} points {'better' if apart.agreed > 0 else 'worse'}."


def by_level(name: str, other: str, what: str, apart: Mapping[Value, Difference]) -> str:
    """One sentence on how two conditions compare at each level of a third thing.

    Args:
        name: of the one.
        other: of the one that it is compared with.
        what: of the levels: ``"images a rank"``.
        apart: level -> ``name - other``.
    """
    better, worse, unsettled = ([level for level, d in apart.items() if d.agreed == sign] for sign in (1, -1, 0))
    parts = [
        f"{how} at {joined([f'{level} ({apart[level].points()})' for level in found])}"
        for how, found in (("better", better), ("worse", worse))
        if found
    ]
    if unsettled:
        parts.append(f"the seeds do not agree at {joined(unsettled)}")
    return f"{name[:1].upper()}{name[1:]} against {other}, by {what}, in points: {'; '.join(parts)}."


def joined(items: Sequence[object]) -> str:
    """``a, b and c``."""
    texts = [f"{item:g}" if isinstance(item, float) else str(item) for item in items]
    return " and ".join([", ".join(texts[:-1]), texts[-1]] if len(texts) > 1 else texts)
