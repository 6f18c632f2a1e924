"""What a monitor found in one step and in all sampled steps, as plain frozen records and as text.

Tuples by rank are in the rank order of the monitored group.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from textwrap import fill
from typing import Any

from syncnorm._torch_versions import DDP_BUFFERS
from syncnorm.monitor.divergence import root_mean_square

SCHEMA = "syncnorm.diagnose"
SCHEMA_VERSION = 1

# A rank is a straggler if all others wait at least twice as long as it does, and at least this much longer.
_STRAGGLER_GAP_MS = 1.0
# Rules of thumb for the divergence of means. With 64 independent values per channel on each of two ranks it is 0.09
# by chance.
_SMALL_DIVERGENCE, _LARGE_DIVERGENCE = 0.05, 0.2
# In columns, of the table and the conclusions: those of a terminal that nobody has widened.
_WIDTH = 80
# Waits of more ranks are shown as a range: in a table, and in a sentence.
_MAX_RANKS, _MAX_RANKS_IN_TEXT = 3, 8


@dataclass(frozen=True)
class LayerSample:
    """One batch norm in one step.

    Attributes:
        name: in the model.
        synced: whether it shares statistics between ranks.
        ran: whether it received values on any rank in training mode.
        spread_mean: of `RankDivergence`, ``mean``; None if the layer did not run or no channel varied.
        spread_var: likewise, ``var``.
        wait_ms: by rank, forward and backward together; None if unknown.
        differing: names of the running statistics whose bits are not identical on all ranks.
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
    """One step; prints as one line.

    Attributes:
        step: number of the step, from 1.
        step_ms: its duration by rank.
        ddp_wait_ms: by rank, the duration of DDP's broadcast of buffers, which is part of the step; the broadcast is
            the first collective of a forward, so that ranks wait in it for a straggler. None if DDP makes no
            broadcast, or one that does not block the host.
        layers: in the model's order.
    """

    step: int
    step_ms: tuple[float, ...]
    ddp_wait_ms: tuple[float, ...] | None
    layers: tuple[LayerSample, ...]

    def __str__(self) -> str:
        """One line."""
        parts = [_divergence_of_step(self.layers)]
        waits = total_waits(self.layers, self.ddp_wait_ms)
        if waits is not None:
            straggler = find_straggler(waits)
            parts.append(
                f"waits {_by_rank(waits)} ms" + ("" if straggler is None else f", rank {straggler} is a straggler")
            )
        differing = sum(bool(layer.differing) for layer in self.layers)
        parts.append(
            f"buffers differ in {differing} of {len(self.layers)} layers" if differing else "buffers identical"
        )
        return f"step {self.step}: " + "; ".join(parts)


@dataclass(frozen=True)
class LayerFinding:
    """One batch norm over all sampled steps: root mean square of the divergences, mean of the waits."""

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
    """All sampled steps; prints as a table with conclusions.

    Attributes:
        world_size: number of monitored ranks.
        steps: number of steps.
        samples: number of sampled steps.
        step_ms: by rank, mean duration of the sampled steps.
        wait_ms: by rank, mean per sampled step, in all layers and DDP's broadcast together; None if both are unknown.
        ddp_wait_ms: of DDP's broadcast alone.
        straggler: the rank that the others wait for, if one stands out.
        ddp_broadcasts: whether DDP overwrites buffers with those of its first rank before each forward; None if the
            monitored model contains no DDP module.
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
        """Plain dicts, lists, numbers and strings, preceded by the name and version of the schema."""
        return {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, **asdict(self)}

    def __str__(self) -> str:
        """A table of all layers, and conclusions, in 80 columns."""
        ranks = f"{self.world_size} rank{'s' * (self.world_size > 1)}"
        head = f"Sampled {self.samples} of {self.steps} steps on {ranks}"
        if not self.samples:
            return f"{head}. Train for more steps, or sample more often (every=)."
        conclusions = (wrapped(text) for text in _conclusions(self))
        return "\n".join([wrapped(f"{head}. {_LEGEND}"), "", *_table(self), "", *conclusions])


def find_straggler(wait_ms: Sequence[float] | None) -> int | None:
    """The rank that waits least, if it waits so much less than all others that they must be waiting for it.

    Each rank measures its waits with its own clock. Clocks of different machines are never compared.
    """
    if wait_ms is None or len(wait_ms) < 2:
        return None
    order = sorted(range(len(wait_ms)), key=lambda rank: wait_ms[rank])
    least, next_ = wait_ms[order[0]], wait_ms[order[1]]
    return order[0] if next_ >= 2 * least and next_ - least >= _STRAGGLER_GAP_MS else None


def total_waits(
    layers: Sequence[LayerSample] | Sequence[LayerFinding], ddp_wait_ms: tuple[float, ...] | None
) -> tuple[float, ...] | None:
    """By rank, the sum of all known waits; None if none is known."""
    known = [wait_ms for wait_ms in (ddp_wait_ms, *(layer.wait_ms for layer in layers)) if wait_ms is not None]
    return tuple(sum(of_rank) for of_rank in zip(*known, strict=True)) if known else None


def summarize(
    samples: Sequence[Sample], kinds: Sequence[str], steps: int, world_size: int, ddp_broadcasts: bool | None
) -> Findings:
    """The findings of ``samples``; ``kinds`` are the layers' class names."""
    by_layer = list(zip(*(sample.layers for sample in samples), strict=True))
    layers = tuple(_summarize_layer(list(seen), kind) for seen, kind in zip(by_layer, kinds, strict=False))
    ddp_wait_ms = _mean_by_rank([sample.ddp_wait_ms for sample in samples if sample.ddp_wait_ms is not None])
    wait_ms = total_waits(layers, ddp_wait_ms)
    return Findings(
        world_size=world_size,
        steps=steps,
        samples=len(samples),
        step_ms=_mean_by_rank([sample.step_ms for sample in samples]) or (),
        wait_ms=wait_ms,
        ddp_wait_ms=ddp_wait_ms,
        straggler=find_straggler(wait_ms),
        ddp_broadcasts=ddp_broadcasts,
        layers=layers,
    )


def _summarize_layer(samples: Sequence[LayerSample], kind: str) -> LayerFinding:
    wait_ms = _mean_by_rank([sample.wait_ms for sample in samples if sample.wait_ms is not None])
    return LayerFinding(
        name=samples[0].name,
        kind=kind,
        synced=samples[-1].synced,
        spread_mean=root_mean_square([sample.spread_mean for sample in samples]),
        spread_var=root_mean_square([sample.spread_var for sample in samples]),
        wait_ms=wait_ms,
        straggler=find_straggler(wait_ms),
        differing=tuple(dict.fromkeys(name for sample in samples for name in sample.differing)),
    )


def _mean_by_rank(rows: Sequence[Sequence[float]]) -> tuple[float, ...] | None:
    return tuple(sum(of_rank) / len(rows) for of_rank in zip(*rows, strict=True)) if rows else None


def _divergence_of_step(layers: Sequence[LayerSample]) -> str:
    known = [layer for layer in layers if layer.spread_mean is not None]
    if not known:
        return "no batch norm ran in training"
    largest = max(known, key=lambda layer: layer.spread_mean or 0.0)
    mean = root_mean_square([layer.spread_mean for layer in known])
    return f"divergence of means {_number(mean)} (largest {_number(largest.spread_mean)} in {largest.name})"


def wrapped(text: str, indent: str = "") -> str:
    """``text`` in lines of 80 columns, the second and later ones after ``indent``; names are never broken."""
    return fill(text, _WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


_LEGEND = (
    "mean, var: the divergence of the ranks' means, in standard deviations, and of their variances, relative; "
    "wait ms: per step, by rank."
)
_HEADERS = ("layer", "class", "synced", "mean", "var", "wait ms", "straggler", "buffers")


def _table(found: Findings) -> list[str]:
    rows: list[tuple[str, ...]] = []
    for layer in found.layers:
        synced = "yes" if layer.synced else "no"
        buffers = "differ" if layer.differing else "identical"
        divergence = (_number(layer.spread_mean), _number(layer.spread_var))
        rows.append((layer.name, layer.kind, synced, *divergence, *_wait_cells(layer.wait_ms), buffers))
    if found.ddp_wait_ms is not None:
        rows.append(("(DDP's broadcast)", *"----", *_wait_cells(found.ddp_wait_ms), "-"))
    # A column that has nothing to say leaves its space to the names.
    nothing = {"straggler": {"-"}, "buffers": {"identical", "-"}}
    columns = [
        (header, *cells)
        for header, *cells in zip(_HEADERS, *rows, strict=True)
        if header not in nothing or not nothing[header].issuperset(cells)
    ]
    return _lines(columns)


def _lines(columns: Sequence[tuple[str, ...]]) -> list[str]:
    """The lines of a table; a name that the width has no space for stands on a line of its own, above its row."""
    names, *others = columns
    cells = ["  ".join(row) for row in zip(*(_justified(column) for column in others), strict=True)]
    space = max(len(names[0]), _WIDTH - len(cells[0]) - 2)
    width = max(len(name) for name in names if len(name) <= space)
    lines = []
    for name, row in zip(names, cells, strict=True):
        if len(name) > space:
            lines.append(name)
            name = ""
        lines.append(f"{name:<{width}}  {row}".rstrip())
    return lines


def _justified(column: Sequence[str]) -> list[str]:
    width = max(map(len, column))
    return [cell.ljust(width) for cell in column]


def _wait_cells(wait_ms: tuple[float, ...] | None) -> tuple[str, str]:
    straggler = find_straggler(wait_ms)
    return "-" if wait_ms is None else _by_rank(
        wait_ms, _MAX_RANKS
    ), "-" if straggler is None else f"rank {straggler}"


def _conclusions(found: Findings) -> Iterator[str]:
    if found.world_size == 1:
        yield "There is only one rank: nothing to synchronize, and no other rank to wait for."
        return
    yield _about_divergence(found)
    yield _about_waits(found)
    yield from _about_buffers(found)


def _about_divergence(found: Findings) -> str:
    known = [layer for layer in found.layers if layer.spread_mean is not None]
    mean = root_mean_square([layer.spread_mean for layer in known])
    if mean is None:
        return "Synchronization: unknown, because no batch norm was seen in training (compiled code is not observed)."
    var = root_mean_square([layer.spread_var for layer in known]) or 0.0
    largest = max(known, key=lambda layer: layer.spread_mean or 0.0)
    text = (
        f"Synchronization: local batch norm shifts a typical channel on a typical rank by {mean:.2g} standard "
        f"deviations ({_number(largest.spread_mean)} in {largest.name}), and its variance is off by {var:.0%}. "
    )
    if mean < _SMALL_DIVERGENCE:
        return text + "The ranks' statistics are so similar that synchronization changes little here."
    if mean < _LARGE_DIVERGENCE:
        return text + (
            "That is noticeable and may or may not matter: `syncnorm compare` trains with and without "
            "synchronization."
        )
    return text + (
        "That is large: with the statistics of all ranks the model computes a different function than with those of "
        "one rank. `syncnorm compare` measures whether that improves your result, and whether group norm does too."
    )


def _about_waits(found: Findings) -> str:
    if found.wait_ms is None:
        return (
            "Waiting: unknown. It is measured in synced layers on CPUs over gloo, and in DDP's broadcast of buffers "
            "over gloo. With NCCL the host does not wait: use a profiler that shows the device."
        )
    step_ms = max(found.step_ms)
    if found.straggler is None:
        return (
            f"Waiting: no rank stands out. In a step of {step_ms:.1f} ms the ranks wait {_by_rank(found.wait_ms)} ms."
        )
    others = [wait for rank, wait in enumerate(found.wait_ms) if rank != found.straggler]
    lost = min(others) - found.wait_ms[found.straggler]
    return (
        f"Waiting: rank {found.straggler} is a straggler. In a step of {step_ms:.1f} ms the others wait {lost:.1f} "
        f"ms longer than it does: check its data loading, its share of the batch, and other processes on its machine."
    )


def _about_buffers(found: Findings) -> Iterator[str]:
    plain = [layer.name for layer in found.layers if layer.differing and not layer.synced]
    synced = [layer.name for layer in found.layers if layer.differing and layer.synced]
    if not plain and not synced:
        yield "Buffers: identical bits on all ranks."
    if plain:
        yield (
            f"Buffers of {_list(plain)} differ: {_list(_differing(found, plain))}. Plain batch norms update them "
            f"with the batch of their own rank. {_CONSEQUENCE[found.ddp_broadcasts]} syncnorm.convert(model) "
            "synchronizes them; syncnorm.training.merge_buffers(model) merges them before you save a checkpoint."
        )
    if synced:
        yield (
            f"Buffers of {_list(synced)} differ: {_list(_differing(found, synced))}, although the layers are synced. "
            f"They differed from the start (only some ranks loaded a checkpoint, and DDP has "
            f"{DDP_BUFFERS}=False), were changed on one rank, or belong to disjoint groups."
        )


# By whether DDP broadcasts buffers.
_CONSEQUENCE = {
    True: "DDP overwrites them with those of its first rank before each forward, so other ranks' are never saved.",
    False: "Nothing makes them equal: each rank evaluates and saves a different model.",
    None: "A checkpoint that one rank saves holds the statistics of that rank.",
}


def _differing(found: Findings, layers: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(name for layer in found.layers if layer.name in layers for name in layer.differing))


def _list(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{', '.join(names[:2])} and {len(names) - 2} more"


def _by_rank(values: Sequence[float], most: int = _MAX_RANKS_IN_TEXT) -> str:
    if len(values) <= most:
        return " ".join(f"{value:.1f}" for value in values)
    return f"{min(values):.1f} to {max(values):.1f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"
