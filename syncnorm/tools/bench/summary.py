"""The summary of a benchmark: the figures that it is for, and their targets."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import geometric_mean

from syncnorm.tools.bench.contenders import LOCAL, LOCAL_AND_COLLECTIVES, MEAN_OF_SQUARES, TORCH
from syncnorm.tools.bench.exchange_latency import AFTER_WORK
from syncnorm.tools.bench.model import COMPILED, DDP, SYNCED, arm_label
from syncnorm.tools.bench.records import ExchangeLatency, LayerRow, MemorySpeed, ModelResult, SummaryLine

LARGE_BYTES = 2**20
# Upper bounds of ratios on CPUs. The layer, by dtype: mean and maximum over the rows, mean over the large ones.
_LOCAL_LIMITS = {"fp32": (0.9, 2.0, 0.7), "bf16": (1.0, None, None)}
_LOCAL_AND_COLLECTIVES_LIMIT, _LOCAL_AND_COLLECTIVES_MAX_LIMIT = 1.0, 1.5
_MEAN_OF_SQUARES_LIMIT = 0.2
# The training step.
_MODEL_LIMIT = 1.03
# Of an exchange after other work, microseconds: median and 90th percentile.
_EXCHANGE_LIMIT_US, _EXCHANGE_P90_LIMIT_US = 30.0, 100.0
# Everywhere: compiled compared with eager, and no slower than torch's own layer where that one runs.
_COMPILED_LIMIT = 1.0
_TORCH_LIMIT = 1.0
# On a GPU. Below this duration, kernel launches are most of a step of the faster of the two layers.
_LAUNCH_BOUND_S = 200e-6
_LAUNCH_BOUND_RATIO = 1.5
_BANDWIDTH_SHARE = 0.85


def summary(
    rows: Sequence[LayerRow], model: ModelResult | None, device: str, wires: bool = True
) -> list[SummaryLine]:
    """The layer compared with its baselines, per dtype, local batch norm first, and the model's arms.

    Args:
        rows: of the layer benchmark.
        model: of the model benchmark.
        device: cpu or cuda.
        wires: whether ranks communicate. The CPU targets of the layer are for ranks that wait for each other: without
            wires, "local + collectives" is the local layer.
    """
    lines = []
    for dtype in dict.fromkeys(row.dtype for row in rows):
        cpu = wires and device == "cpu"
        fp32 = cpu and dtype == "fp32"
        of_dtype = [row for row in rows if row.dtype == dtype]
        mean_limit, max_limit, large_limit = _LOCAL_LIMITS[dtype] if cpu else (None, None, None)
        lines += _row_ratios(of_dtype, LOCAL.name, LOCAL.label, mean_limit, max_limit)
        lines += _large_row_ratio(of_dtype, large_limit)
        both_limits = (_LOCAL_AND_COLLECTIVES_LIMIT, _LOCAL_AND_COLLECTIVES_MAX_LIMIT) if fp32 else (None, None)
        lines += _row_ratios(of_dtype, LOCAL_AND_COLLECTIVES.name, f"({LOCAL_AND_COLLECTIVES.label})", *both_limits)
        squares_limit = _MEAN_OF_SQUARES_LIMIT if fp32 else None
        lines += _row_ratios(of_dtype, MEAN_OF_SQUARES.name, MEAN_OF_SQUARES.name, squares_limit, None)
        lines += _row_ratios(of_dtype, TORCH.name, TORCH.name, None, _TORCH_LIMIT)
    if model is not None:
        lines += _model_ratios(model, device == "cpu")
    return lines


def exchange_summary(exchange: ExchangeLatency | None) -> list[SummaryLine]:
    """The time of an exchange as a model makes it, after other work, in microseconds."""
    if exchange is None:
        return []
    situation = exchange[AFTER_WORK]
    what = f"exchange {AFTER_WORK}, us"
    return [
        SummaryLine(f"{what}, median", situation.median * 1e6, _EXCHANGE_LIMIT_US, exchange.transport),
        SummaryLine(f"{what}, 90 %", situation.p90 * 1e6, _EXCHANGE_P90_LIMIT_US, exchange.transport),
    ]


def _row_ratios(
    rows: Sequence[LayerRow], baseline: str, label: str, mean_limit: float | None, max_limit: float | None
) -> list[SummaryLine]:
    ratios = [(ratio, row.label) for row in rows if (ratio := row["syncnorm"].ratio(baseline)) is not None]
    if not ratios:
        return []
    mean, (largest, where) = geometric_mean(ratio for ratio, _ in ratios), max(ratios)
    return [
        SummaryLine(f"syncnorm / {label}, {rows[0].dtype}, mean", mean, mean_limit),
        SummaryLine(f"syncnorm / {label}, {rows[0].dtype}, max", largest, max_limit, where),
    ]


def _large_row_ratio(rows: Sequence[LayerRow], limit: float | None) -> list[SummaryLine]:
    """The geometric mean over the rows for which the passes over memory are most of a step."""
    large = [row for row in rows if row.num_bytes >= LARGE_BYTES]
    ratios = [ratio for row in large if (ratio := row["syncnorm"].ratio(LOCAL.name)) is not None]
    if not ratios:
        return []
    what = f"syncnorm / {LOCAL.label}, {large[0].dtype}, 1 MiB and more, mean"
    return [SummaryLine(what, geometric_mean(ratios), limit, f"{len(ratios)} row{'s' * (len(ratios) > 1)}")]


def _model_ratios(model: ModelResult, cpu: bool) -> list[SummaryLine]:
    lines = []
    for arm in model.arms:
        for baseline, ratio in (arm.ratio_to or {}).items():
            if arm.name == SYNCED:
                limit = _MODEL_LIMIT if cpu and baseline == DDP else None
                lines.append(SummaryLine(f"model, {SYNCED} / {arm_label(baseline)}", ratio, limit))
            elif arm.name == COMPILED and baseline == SYNCED:
                lines.append(SummaryLine(f"model, {SYNCED} compiled / eager", ratio, _COMPILED_LIMIT))
    return lines


def gpu_summary(rows: Sequence[LayerRow], memory: MemorySpeed | None, device: str) -> list[SummaryLine]:
    """What the layer should reach on one GPU: compared with torch's own layer, and with the bandwidth of the memory.

    Values are None where nothing was measured; the bandwidth has a target only on a GPU.
    """
    if not rows:
        return []
    limit = _BANDWIDTH_SHARE if device == "cuda" else None
    return [*_compared_with_torch(rows), _bandwidth_share(rows, memory, limit)]


def _compared_with_torch(rows: Sequence[LayerRow]) -> list[SummaryLine]:
    under = f"steps under {_LAUNCH_BOUND_S * 1e6:.0f} us"
    share, mean_ratio, share_slower = (
        f"{under}, share of rows",
        f"{under}, torch / syncnorm, mean",
        "share of rows slower than torch's layer",
    )
    speedups = [(1 / ratio, row) for row in rows if (ratio := row["syncnorm"].ratio("torch")) is not None]
    if not speedups:
        why = "torch's layer did not run"
        return [
            SummaryLine(share, None, None, why),
            SummaryLine(mean_ratio, None, _LAUNCH_BOUND_RATIO, why, at_least=True),
            SummaryLine(share_slower, None, 0.0, why),
        ]
    launch_bound = [speedup for speedup, row in speedups if _faster_step(row) < _LAUNCH_BOUND_S]
    slower = sum(speedup < 1 for speedup, _ in speedups)  # `summary` has the slowest of them
    mean, lowest = None, "no row is so fast"
    if launch_bound:
        mean, lowest = geometric_mean(launch_bound), f"lowest {min(launch_bound):.2f}"
    return [
        SummaryLine(share, len(launch_bound) / len(speedups), where=f"{len(launch_bound)} of {len(speedups)}"),
        SummaryLine(mean_ratio, mean, _LAUNCH_BOUND_RATIO, lowest, at_least=True),
        SummaryLine(share_slower, slower / len(speedups), 0.0, f"{slower} of {len(speedups)}"),
    ]


def _faster_step(row: LayerRow) -> float:
    return min(timing.median for timing in (row["syncnorm"], row["torch"]) if timing.median is not None)


def _bandwidth_share(rows: Sequence[LayerRow], memory: MemorySpeed | None, limit: float | None) -> SummaryLine:
    what = "share of copy bandwidth past the cache, mean"
    if memory is None or memory.cache_bytes is None:
        return SummaryLine(what, None, limit, "cache size not known", at_least=True)
    shares = [row.bandwidth_shares["syncnorm"] for row in rows if row.num_bytes > memory.cache_bytes]
    if not shares:
        return SummaryLine(what, None, limit, "all rows fit the cache", at_least=True)
    where = f"{len(shares)} rows, lowest {min(shares):.2f}"
    return SummaryLine(what, geometric_mean(shares), limit, where, at_least=True)
