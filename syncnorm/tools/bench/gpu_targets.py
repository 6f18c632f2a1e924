"""What the layer is to reach on one GPU: beside torch's own layer, and of the memory's speed."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import geometric_mean

from syncnorm.tools.bench.records import Figure, Memory, Row

# Below it launches are most of what a step of the faster of the two layers takes.
LAUNCHES_SECONDS = 200e-6
LAUNCHES_RATIO = 1.5
BANDWIDTH_SHARE = 0.85


def gpu_figures(rows: Sequence[Row], memory: Memory | None, device: str) -> tuple[Figure, ...]:
    """The figures in question; None for what was not measured. Targets are a GPU's."""
    if not rows:
        return ()
    return (*_beside_torch(rows), _of_bandwidth(rows, memory, BANDWIDTH_SHARE if device == "cuda" else None))


def _beside_torch(rows: Sequence[Row]) -> tuple[Figure, Figure, Figure]:
    under = f"steps under {LAUNCHES_SECONDS * 1e6:.0f} us"
    names = (f"{under}, share of rows", f"{under}, torch / syncnorm, mean", "share of rows slower than torch's layer")
    speedups = [(1 / ratio, row) for row in rows if (ratio := row["syncnorm"].ratio("torch")) is not None]
    if not speedups:
        why = "torch's layer did not run"
        return (
            Figure(names[0], None, None, why),
            Figure(names[1], None, LAUNCHES_RATIO, why, at_least=True),
            Figure(names[2], None, 0.0, why),
        )
    of_launches = [speedup for speedup, row in speedups if _faster_step(row) < LAUNCHES_SECONDS]
    slower = sum(speedup < 1 for speedup, _ in speedups)  # the slowest has a line of its own in the summary
    mean, lowest = None, "no row is so fast"
    if of_launches:
        mean, lowest = geometric_mean(of_launches), f"lowest {min(of_launches):.2f}"
    return (
        Figure(names[0], len(of_launches) / len(speedups), where=f"{len(of_launches)} of {len(speedups)}"),
        Figure(names[1], mean, LAUNCHES_RATIO, lowest, at_least=True),
        Figure(names[2], slower / len(speedups), 0.0, f"{slower} of {len(speedups)}"),
    )


def _faster_step(row: Row) -> float:
    return min(timing.median for timing in (row["syncnorm"], row["torch"]) if timing.median is not None)


def _of_bandwidth(rows: Sequence[Row], memory: Memory | None, limit: float | None) -> Figure:
    name = "share of copy bandwidth past the cache, mean"
    if memory is None or memory.cache_bytes is None:
        return Figure(name, None, limit, "cache size not known", at_least=True)
    shares = [row.bandwidth_shares["syncnorm"] for row in rows if row.num_bytes > memory.cache_bytes]
    if not shares:
        return Figure(name, None, limit, "all rows fit the cache", at_least=True)
    where = f"{len(shares)} rows, lowest {min(shares):.2f}"
    return Figure(name, geometric_mean(shares), limit, where, at_least=True)
