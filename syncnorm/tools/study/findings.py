"""From rows to sentences: differences paired by seed, and what the seeds agree on in words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, stdev

from syncnorm.tools.common.stats import PairedDifference
from syncnorm.tools.study.records import StudyRow, Value

# Seed -> value.
BySeed = Mapping[int, float]


def values(rows: Iterable[StudyRow], measure: str, **condition: Value) -> dict[int, float]:
    """Seed -> value of the rows of ``measure`` whose condition includes ``condition``."""
    return {
        row.seed: row.value for row in rows if row.measure == measure and condition.items() <= row.condition.items()
    }


def levels(rows: Iterable[StudyRow], name: str) -> list[Value]:
    """The distinct values of the condition ``name``, in order of first appearance."""
    return list(dict.fromkeys(row.condition[name] for row in rows if name in row.condition))


def std(sample: Sequence[float]) -> float:
    """Standard deviation over seeds (n - 1); 0 for a single seed."""
    return stdev(sample) if len(sample) > 1 else 0.0


def difference(a: BySeed, b: BySeed) -> PairedDifference:
    """``a - b`` over the seeds that both have.

    Raises:
        ValueError: no seed has both.
    """
    seeds = sorted(a.keys() & b.keys())
    if not seeds:
        raise ValueError("no seed has both")
    return PairedDifference(tuple(a[seed] - b[seed] for seed in seeds))


def agreed_sign(found: PairedDifference) -> int:
    """1 or -1 where the seeds agree that the difference is positive or negative, else 0.

    They agree if every seed has that sign and the 95 % interval of the mean (Student's t, which is wide for few
    seeds: 4.3 standard errors for three) excludes zero.
    """
    sign = 1 if found.mean > 0 else -1
    agree = all(d * sign > 0 for d in found.by_seed) and abs(found.mean) > found.half_width
    return sign if agree else 0


def points(found: PairedDifference, signed: bool = True) -> str:
    """Mean and standard error in percentage points: ``+1.2 ± 0.3``; without the sign if not ``signed``."""
    mean = f"{100 * found.mean:+.1f}" if signed else f"{100 * abs(found.mean):.1f}"
    return f"{mean} ± {100 * found.std_error:.1f}"


def percent(by_seed: BySeed) -> str:
    """Mean over the seeds: ``97.5 %``."""
    return f"{100 * fmean(by_seed.values()):.1f} %"


def compared(name: str, sample: BySeed, other_name: str, other: BySeed) -> str:
    """One sentence on two samples, not capitalized: the means, the paired difference, whether the seeds agree."""
    found = difference(sample, other)
    means = f"{name} reaches {percent(sample)} and {other_name} {percent(other)}"
    if sign := agreed_sign(found):
        return f"{means}: {points(found, signed=False)} points {'better' if sign > 0 else 'worse'}."
    return f"{means}: the seeds do not agree on a difference ({points(found)} points)."


def by_level(name: str, other: str, what: str, differences: Mapping[Value, PairedDifference]) -> str:
    """One sentence on how two conditions compare at each level of a third.

    Args:
        name: of the condition that is compared.
        other: of the condition that it is compared with.
        what: name of the levels: ``"images per rank"``.
        differences: level -> ``name - other``.
    """
    signs = {level: agreed_sign(found) for level, found in differences.items()}
    parts = []
    for verdict, sign in (("better", 1), ("worse", -1)):
        agreed = [f"{_quoted(level)} ({points(differences[level])})" for level in signs if signs[level] == sign]
        if agreed:
            parts.append(f"{verdict} at {joined(agreed)}")
    if undecided := [_quoted(level) for level in signs if signs[level] == 0]:
        parts.append(f"the seeds do not agree at {joined(undecided)}")
    subject = f"{name[:1].upper()}{name[1:]}"
    return f"{subject} compared with {other}, by {what}, in percentage points: {'; '.join(parts)}."


def _quoted(level: Value) -> str:
    return f'"{level}"' if isinstance(level, str) else text(level)


def joined(items: Sequence[Value]) -> str:
    """``a, b and c``."""
    texts = [text(item) for item in items]
    return " and ".join([", ".join(texts[:-1]), texts[-1]] if len(texts) > 1 else texts)


def text(value: Value) -> str:
    """A value of a condition as text; numbers without needless digits."""
    return f"{value:g}" if isinstance(value, float) else str(value)
