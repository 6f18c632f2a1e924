"""What a monitor says: a line for a step, a table at the end, and sentences that say what follows from it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from textwrap import fill

from syncnorm.monitor.findings import (
    Findings,
    LayerFinding,
    LayerSample,
    Sample,
    root_mean_square,
    straggler,
    summed_waits,
)

# Rules of thumb. 64 independent values a channel on each of two ranks lie 0.09 standard deviations apart by chance.
CLOSE, FAR = 0.05, 0.2
# Longer lines of text are hard to read.
WIDTH = 100


def line(sample: Sample) -> str:
    """One sampled step."""
    parts = [_line_of_spread(sample.layers)]
    waits = summed_waits(sample.layers, sample.ddp_wait_ms)
    if waits is not None:
        behind = straggler(waits)
        parts.append(f"waits {_by_rank(waits)} ms" + ("" if behind is None else f", rank {behind} is behind"))
    differing = sum(bool(layer.differing) for layer in sample.layers)
    parts.append(f"buffers differ in {differing} of {len(sample.layers)} layers" if differing else "buffers agree")
    return f"step {sample.step}: " + "; ".join(parts)


def _line_of_spread(layers: Sequence[LayerSample]) -> str:
    known = [layer for layer in layers if layer.spread_mean is not None]
    if not known:
        return "no batch norm ran in training"
    most = max(known, key=lambda layer: layer.spread_mean or 0.0)
    mean = root_mean_square([layer.spread_mean for layer in known])
    return f"spread of means {_number(mean)} (most {_number(most.spread_mean)} in {most.name})"


def findings_text(found: Findings) -> str:
    """The table of all layers, and the sentences below it."""
    ranks = f"{found.world_size} rank{'s' * (found.world_size > 1)}"
    head = f"{found.samples} of {found.steps} steps on {ranks}"
    if not found.samples:
        return f"{head}: nothing to tell. Watch more steps, or sample more often (every=)."
    rows: list[tuple[str, ...]] = [_HEADERS]
    rows += [_row(layer) for layer in found.layers]
    if found.ddp_wait_ms is not None:
        behind = straggler(found.ddp_wait_ms)
        rows.append((_DDP, *"----", _by_rank(found.ddp_wait_ms), "-" if behind is None else f"rank {behind}", "-"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([f"{head}:", *table, "", *(fill(told, WIDTH) for told in _sentences(found))])


_DDP = "(DDP's broadcast)"
_HEADERS = ("layer", "class", "synced", "spread: means", "variances", "wait ms a step by rank", "behind", "buffers")


def _row(layer: LayerFinding) -> tuple[str, ...]:
    return (
        layer.name,
        layer.kind,
        "yes" if layer.synced else "no",
        _number(layer.spread_mean),
        _number(layer.spread_var),
        "-" if layer.wait_ms is None else _by_rank(layer.wait_ms),
        "-" if layer.straggler is None else f"rank {layer.straggler}",
        f"differ: {', '.join(layer.differing)}" if layer.differing else "agree",
    )


def _sentences(found: Findings) -> Iterator[str]:
    if found.world_size == 1:
        yield "There is one rank: nothing to sync, nobody to wait for."
        return
    yield _of_spread(found)
    yield _of_waits(found)
    yield from _of_buffers(found)


def _of_spread(found: Findings) -> str:
    known = [layer for layer in found.layers if layer.spread_mean is not None]
    mean = root_mean_square([layer.spread_mean for layer in known])
    if mean is None:
        return "Syncing: nothing can be said, for no batch norm was seen in training (in compiled code none is)."
    var = root_mean_square([layer.spread_var for layer in known]) or 0.0
    most = max(known, key=lambda layer: layer.spread_mean or 0.0)
    told = (
        f"Syncing: on a typical rank a local batch norm shifts a typical channel by {mean:.2g} standard deviations "
        f"({_number(most.spread_mean)} in {most.name}) and has its variance {var:.0%} off. "
    )
    if mean < CLOSE:
        return told + "The ranks are so much alike that syncing changes little here."
    if mean < FAR:
        return told + "That is noticeable, and may or may not matter: `syncnorm compare` trains with and without."
    return told + (
        "That is far: with the statistics of all ranks the model computes something else than with those of one. "
        "Whether that helps your result, and whether group norm would as well, `syncnorm compare` measures."
    )


def _of_waits(found: Findings) -> str:
    if found.wait_ms is None:
        return (
            "Waiting: not known. It is measured in synced layers on CPUs over gloo, and where DDP broadcasts buffers "
            "over gloo; with NCCL the host does not wait, and a profiler has to look at the device."
        )
    step = max(found.step_ms)
    if found.straggler is None:
        return f"Waiting: no rank stands out. Of a step of {step:.1f} ms the ranks wait {_by_rank(found.wait_ms)} ms."
    others = [wait for rank, wait in enumerate(found.wait_ms) if rank != found.straggler]
    lost = min(others) - found.wait_ms[found.straggler]
    return (
        f"Waiting: rank {found.straggler} is behind. In a step of {step:.1f} ms the others wait {lost:.1f} ms longer "
        f"than it does: look at its data loading, its share of the batch, and what else runs on its machine."
    )


def _of_buffers(found: Findings) -> Iterator[str]:
    plain = [layer.name for layer in found.layers if layer.differing and not layer.synced]
    synced = [layer.name for layer in found.layers if layer.differing and layer.synced]
    if not plain and not synced:
        yield "Buffers: the same bits on all ranks."
    if plain:
        yield (
            f"Buffers of {_some(plain)} differ: plain batch norms learn them from their own rank's batch. "
            f"{_FATE[found.ddp_broadcasts]} convert(model) syncs them; training.merge_buffers(model), before saving, "
            "makes one of them."
        )
    if synced:
        yield (
            f"Buffers of {_some(synced)} differ although the layers are synced. They began so (a checkpoint loaded "
            "on some ranks only, and DDP's forward_sync_buffers=False), were changed on one rank, or belong to "
            "groups that share nothing with each other."
        )


# By whether DDP broadcasts buffers.
_FATE = {
    True: "DDP overwrites them with its first rank's before each forward: what the others learnt is never saved.",
    False: "Nothing makes them equal: each rank evaluates, and saves, a model of its own.",
    None: "A checkpoint of one rank holds what that rank learnt.",
}


def _some(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{', '.join(names[:2])} and {len(names) - 2} more"


def _by_rank(values: Sequence[float]) -> str:
    if len(values) <= 8:
        return " ".join(f"{value:.1f}" for value in values)
    return f"{min(values):.1f} to {max(values):.1f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"
