"""What a monitor found, as plain frozen records: of one step, and of all that it sampled.

Lists by rank are in rank order of the group that was watched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import isfinite, sqrt
from typing import Any

SCHEMA = "syncnorm.diagnose"
SCHEMA_VERSION = 1

# A rank is behind if the others wait at least twice as long as it does, and at least this much longer.
_BEHIND_MS = 1.0


@dataclass(frozen=True)
class LayerSample:
    """One batch norm in one step.

    Attributes:
        name: in the model.
        synced: whether it shared statistics.
        ran: whether any rank sent values through it, in training.
        spread_mean: `spread`'s; None where nothing ran or varied.
        spread_var: likewise.
        wait_ms: by rank, forward and backward together; None where that is not known.
        differing: its running statistics that are not the same bits on all ranks.
    """

    name: str
    synced: bool
    ran: bool
    spread_mean: float | None
    spread_var: float | None
    wait_ms: tuple[float, ...] | None
    differing: tuple[str, ...]


@dataclass(frozen=True)
class Sample:
    """One step: every layer, how long the step took on each rank, and what of it was DDP's broadcast of buffers.

    That comes first in a forward, so who is late is waited for there. None where DDP makes none, or none that blocks.
    """

    step: int
    step_ms: tuple[float, ...]
    ddp_wait_ms: tuple[float, ...] | None
    layers: tuple[LayerSample, ...]


@dataclass(frozen=True)
class LayerFinding:
    """One batch norm over all sampled steps: root mean square of the spreads, mean of the waits."""

    name: str
    kind: str
    synced: bool
    spread_mean: float | None
    spread_var: float | None
    wait_ms: tuple[float, ...] | None
    straggler: int | None
    differing: tuple[str, ...]


@dataclass(frozen=True)
class Findings:
    """All sampled steps.

    Attributes:
        world_size: ranks that were watched.
        steps: that were counted.
        samples: of them that were looked at.
        step_ms: by rank, mean of the sampled steps.
        wait_ms: by rank and sampled step, of all layers and of DDP's broadcast; None where neither is known.
        ddp_wait_ms: of DDP's broadcast alone.
        straggler: the rank that the others wait for, if one stands out.
        ddp_broadcasts: whether DDP overwrites buffers with those of its first rank before each forward; None
            where the model that is watched is in no DDP that the monitor sees.
        layers: in the model's order.
    """

    world_size: int
    steps: int
    samples: int
    step_ms: tuple[float, ...]
    wait_ms: tuple[float, ...] | None
    ddp_wait_ms: tuple[float, ...] | None
    straggler: int | None
    ddp_broadcasts: bool | None
    layers: tuple[LayerFinding, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, numbers and strings, with the schema's name and version in front."""
        return {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, **asdict(self)}

    def __str__(self) -> str:
        """The table, and what it says."""
        from syncnorm.monitor.telling import findings_text

        return findings_text(self)


def straggler(wait_ms: Sequence[float] | None) -> int | None:
    """The rank that waits least, if it waits so much less than all others that they wait for it.

    Waiting is told by each rank's own clock, and clocks of different machines are never compared.
    """
    if wait_ms is None or len(wait_ms) < 2:
        return None
    order = sorted(range(len(wait_ms)), key=lambda rank: wait_ms[rank])
    least, next_ = wait_ms[order[0]], wait_ms[order[1]]
    return order[0] if next_ >= 2 * least and next_ - least >= _BEHIND_MS else None


def summed_waits(
    layers: Sequence[LayerSample] | Sequence[LayerFinding], ddp_wait_ms: tuple[float, ...] | None
) -> tuple[float, ...] | None:
    """By rank, over the layers whose waits are known and DDP's; None if that is none of them."""
    known = [wait_ms for wait_ms in (ddp_wait_ms, *(layer.wait_ms for layer in layers)) if wait_ms is not None]
    return tuple(sum(of_rank) for of_rank in zip(*known, strict=True)) if known else None


def summary(
    samples: Sequence[Sample], kinds: Sequence[str], steps: int, world_size: int, broadcasts: bool | None
) -> Findings:
    """The findings of ``samples``; ``kinds`` are the layers' classes."""
    by_layer = list(zip(*(sample.layers for sample in samples), strict=True))
    layers = tuple(_of_layer(list(seen), kind) for seen, kind in zip(by_layer, kinds, strict=False))
    ddp = _mean_by_rank([sample.ddp_wait_ms for sample in samples if sample.ddp_wait_ms is not None])
    waits = summed_waits(layers, ddp)
    step_ms = _mean_by_rank([sample.step_ms for sample in samples]) or ()
    return Findings(world_size, steps, len(samples), step_ms, waits, ddp, straggler(waits), broadcasts, layers)


def _of_layer(seen: Sequence[LayerSample], kind: str) -> LayerFinding:
    waits = _mean_by_rank([sample.wait_ms for sample in seen if sample.wait_ms is not None])
    return LayerFinding(
        name=seen[0].name,
        kind=kind,
        synced=seen[-1].synced,
        spread_mean=root_mean_square([sample.spread_mean for sample in seen]),
        spread_var=root_mean_square([sample.spread_var for sample in seen]),
        wait_ms=waits,
        straggler=straggler(waits),
        differing=tuple(dict.fromkeys(name for sample in seen for name in sample.differing)),
    )


def root_mean_square(values: Sequence[float | None]) -> float | None:
    """Of those that are numbers; None if none is."""
    finite = [value for value in values if value is not None and isfinite(value)]
    return sqrt(sum(value * value for value in finite) / len(finite)) if finite else None


def _mean_by_rank(rows: Sequence[Sequence[float]]) -> tuple[float, ...] | None:
    return tuple(sum(of_rank) / len(rows) for of_rank in zip(*rows, strict=True)) if rows else None
