"""Which arms of a comparison are compared with which, and the `Decision` on each pair."""

from __future__ import annotations

from collections.abc import Iterator
from math import isfinite

import torch

from syncnorm.tools.common.decision import LEVEL, Difference, Rule, Scores, level_of_look
from syncnorm.tools.common.units import decode
from syncnorm.tools.compare.records import ArmResult, Comparison, Decision

LOCAL, SYNCED, REFERENCE = "ddp", "ddp+syncbn", "single"
ACCUMULATED_LOCALLY, ACCUMULATED, ACCUMULATED_EXACTLY = "accumulate-bn", "accumulate", "accumulate-exact"


def decisions(comparison: Comparison) -> tuple[Decision, ...]:
    """A decision on every pair of `pairs` of which both arms ran and did not diverge."""
    arms = {arm.name: arm for arm in comparison.arms}
    found = (decide(comparison, arms[name], arms[other]) for name, other in pairs(arms))
    return tuple(decision for decision in found if decision is not None)


def pairs(names: Iterator[str] | dict[str, ArmResult]) -> Iterator[tuple[str, str]]:
    """Local BN and SyncBN with the whole batch, SyncBN with local BN, and every other arm with SyncBN.

    Other ways of accumulation are also compared with that of local BN, with as many micro-batches.
    """
    present = list(names)
    others = [name for name in present if name not in (REFERENCE, LOCAL, SYNCED)]
    wanted = [(LOCAL, REFERENCE), (SYNCED, LOCAL), (SYNCED, REFERENCE)]
    wanted += [(name, SYNCED if SYNCED in present else REFERENCE) for name in others]
    for name in others:
        base, colon, number = name.partition(":")
        if base in (ACCUMULATED, ACCUMULATED_EXACTLY):
            wanted.append((name, f"{ACCUMULATED_LOCALLY}{colon}{number}"))
    return ((name, other) for name, other in wanted if name in present and other in present)


def essential(decision: Decision) -> bool:
    """Whether the advice depends on it; seeds are added until these are decided."""
    return (decision.arm, decision.other) in ((LOCAL, REFERENCE), (SYNCED, LOCAL))


def decide(comparison: Comparison, arm: ArmResult, other: ArmResult) -> Decision | None:
    """``arm`` compared with ``other``; ``None`` if one of them did not run, or diverged."""
    ours, theirs = _scores(comparison, arm), _scores(comparison, other)
    if ours is None or theirs is None or len(ours.by_seed) != len(theirs.by_seed):
        return None
    metric, looks = comparison.task.metric, comparison.looks
    rule = Rule(
        share=metric.share,
        higher_is_better=metric.higher_is_better,
        margin=comparison.settings.margin,
        level=level_of_look(looks) if looks else LEVEL,
    )
    return _decision(arm.name, other.name, rule.decide(ours, theirs))


def _decision(arm: str, other: str, found: Difference) -> Decision:
    return Decision(
        arm=arm,
        other=other,
        kind=found.kind,
        difference=found.mean,
        by_seed=found.by_seed,
        low=found.low if isfinite(found.low) else None,
        high=found.high if isfinite(found.high) else None,
        margin=found.margin,
        confidence=1 - found.level,
        more_seeds=found.more_seeds,
        more_samples=found.more_samples,
    )


def _scores(comparison: Comparison, arm: ArmResult) -> Scores | None:
    values = tuple(value for value in arm.results if value is not None)
    if not values or len(values) != len(arm.seeds) or arm.diverged:
        return None
    units = [decode(run.units) for run in arm.seeds]
    number = comparison.task.num_test if comparison.task.metric.units == "samples" else len(units[0])
    known = all(len(each) == number > 0 for each in units)
    return Scores(values, torch.stack(units) if known else None, comparison.task.num_test)
