"""From rows to sentences: differences paired by seed and by image, and what their intervals say in words.

A difference is described by one of three sentences, which depends on its interval alone (`tools.common.decision`):
better or worse, equivalent within the margin, or undecided.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Literal

import torch

from syncnorm.tools.common.decision import Difference, Kind, Rule, Scores
from syncnorm.tools.common.units import decode
from syncnorm.tools.study.records import StudyRow, Value

# Seed -> value, and seed -> the row that has it.
BySeed = Mapping[int, float]
Runs = Mapping[int, StudyRow]
# Whether a comparison supports a claim, contradicts it, or leaves it open.
Support = Literal["supports", "contradicts", "open"]


def runs(rows: Iterable[StudyRow], measure: str, **condition: Value) -> dict[int, StudyRow]:
    """Seed -> row, of the rows of ``measure`` whose condition includes ``condition``."""
    return {row.seed: row for row in rows if row.measure == measure and condition.items() <= row.condition.items()}


def values(rows: Iterable[StudyRow], measure: str, **condition: Value) -> dict[int, float]:
    """Seed -> value, of the same rows as `runs`."""
    return {seed: row.value for seed, row in runs(rows, measure, **condition).items()}


def levels(rows: Iterable[StudyRow], name: str) -> list[Value]:
    """The distinct values of the condition ``name``, in order of first appearance."""
    return list(dict.fromkeys(row.condition[name] for row in rows if name in row.condition))


def std(sample: Sequence[float]) -> float:
    """Standard deviation over seeds (n - 1); 0 for a single seed."""
    return stdev(sample) if len(sample) > 1 else 0.0


def difference(ours: Runs, other: Runs, rule: Rule) -> Difference:
    """How much better ``ours`` are, over the seeds that both have.

    Raises:
        ValueError: no seed has both, or ``rule`` compares accuracies and the rows do not have the results per image,
            as in records of schema version 1.
    """
    seeds = sorted(ours.keys() & other.keys())
    if not seeds:
        raise ValueError("no seed has both")
    return rule.decide(*(_scores([each[seed] for seed in seeds], rule) for each in (ours, other)))


def _scores(rows: Sequence[StudyRow], rule: Rule) -> Scores:
    by_seed = tuple(row.value for row in rows)
    if not rule.share:
        return Scores(by_seed, None, num_samples=1)  # a measurement without samples, such as a time
    if not all(row.units for row in rows):
        raise ValueError("the accuracies have no results per image: run the study again")
    units_SU = torch.stack([decode(row.units) for row in rows])
    return Scores(by_seed, units_SU, num_samples=units_SU.shape[1])


def outcome(found: Difference, unit: str = "points") -> str:
    """``better by 5.0 points (95% interval 4.2 to 5.9)``, or what says equivalent or undecided."""
    interval = f"{100 * (1 - found.level):g}% interval {ends(found)}"
    if found.kind == "equivalent":
        return f"equivalent within the margin of {number(found.margin)} {unit} ({interval})"
    if found.kind == "undecided":
        return f"undecided, {number(found.mean, signed=True)} {unit} ({interval}); {would_decide(found)}"
    return f"{found.kind} by {number(abs(found.mean))} {unit} ({interval})"


def ends(found: Difference) -> str:
    """The interval: ``-0.2 to +1.4``; without signs if it is entirely better or worse."""
    if found.kind in ("better", "worse"):
        low, high = sorted((abs(found.low), abs(found.high)))
        return f"{number(low)} to {number(high)}"
    return f"{number(found.low, signed=True)} to {number(found.high, signed=True)}"


def would_decide(found: Difference) -> str:
    """How many more seeds would decide an undecided difference."""
    if found.more_seeds is None:
        return "more seeds alone would not decide"
    return f"about {found.more_seeds} more seed{'s' * (found.more_seeds > 1)} would decide"


def number(value: float, signed: bool = False) -> str:
    """Points and other differences, with about two digits: ``12.3``, ``0.04``."""
    return format(value, ("+" if signed else "") + (".1f" if abs(value) >= 0.95 else ".2g"))


def percent(by_seed: BySeed) -> str:
    """Mean over the seeds: ``97.5 %``."""
    return f"{100 * fmean(by_seed.values()):.1f} %"


def compared(name: str, ours: Runs, other_name: str, other: Runs, rule: Rule) -> str:
    """One sentence on two accuracies, not capitalized: the means, and what the interval of the difference says."""
    means = f"{name} reaches {percent(_values(ours))} and {other_name} {percent(_values(other))}"
    return f"{means}: {outcome(difference(ours, other, rule))}."


def _values(found: Runs) -> dict[int, float]:
    return {seed: row.value for seed, row in found.items()}


def by_level(name: str, other: str, what: str, differences: Mapping[Value, Difference]) -> str:
    """One sentence on how two conditions compare at each level of a third.

    Args:
        name: of the condition that is compared.
        other: of the condition that it is compared with.
        what: name of the levels: ``"images per rank"``.
        differences: level -> ``name - other``, in percentage points.
    """
    kinds: tuple[Kind, ...] = ("better", "worse", "equivalent", "undecided")
    parts = []
    for kind in kinds:
        if of_kind := {level: found for level, found in differences.items() if found.kind == kind}:
            margin = f" within {number(next(iter(of_kind.values())).margin)}" if kind == "equivalent" else ""
            parts.append(f"{kind}{margin} at {joined([_at_level(*each) for each in of_kind.items()])}")
    subject = f"{name[:1].upper()}{name[1:]}"
    return f"{subject} compared with {other}, by {what}, in percentage points (95% intervals): {'; '.join(parts)}."


def _at_level(level: Value, found: Difference) -> str:
    where = f'"{level}"' if isinstance(level, str) else text(level)
    if found.kind == "undecided":
        return f"{where} ({ends(found)}, {would_decide(found)})"
    size = "" if found.kind == "equivalent" else f" by {number(abs(found.mean))}"
    return f"{where}{size} ({ends(found)})"


def support(found: Difference, claimed: Kind) -> Support:
    """Whether a difference supports the claim that it is ``claimed``: equivalence contradicts better and worse."""
    return "open" if found.kind == "undecided" else "supports" if found.kind == claimed else "contradicts"


def verdict(claim: str, parts: Sequence[Support]) -> str:
    """Whether a claim holds of which each of ``parts`` is a necessary part; it is undecided where one is.

    Args:
        claim: follows "The claim that".
        parts: what each comparison says.
    """
    found = Counter(parts)
    if found["supports"] == len(parts):
        status = "holds"
    elif found["contradicts"] == len(parts):
        status = "does not hold"
    elif not found["contradicts"]:
        status = "is undecided"
    else:
        status = "holds in part" if found["supports"] else "holds at most in part"
    sentence = f"The claim that {claim} {status} here"
    if len(parts) == 1:
        return f"{sentence}."
    return (
        f"{sentence}: supported by {found['supports']}, contradicted by {found['contradicts']} and left open by "
        f"{found['open']} of {len(parts)} comparisons."
    )


def joined(items: Sequence[Value]) -> str:
    """``a, b and c``."""
    texts = [text(item) for item in items]
    return " and ".join([", ".join(texts[:-1]), texts[-1]] if len(texts) > 1 else texts)


def text(value: Value) -> str:
    """A value of a condition as text; numbers without needless digits."""
    return f"{value:g}" if isinstance(value, float) else str(value)
