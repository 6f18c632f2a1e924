"""From times to figures: the order of the contenders, medians and quartiles, ratios inside one run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import geometric_mean
from typing import TypeVar

from syncnorm.tools.bench.records import Figure, ModelResult, Row, Timing
from syncnorm.tools.common.stats import median_ratio, quartiles

T = TypeVar("T")

# What the CPU layer and the CPU training step are to reach.
FLOOR_LIMIT, FLOOR_WORST_LIMIT = 1.0, 1.5
MEAN_OF_SQUARES_LIMIT = 0.4
MODEL_LIMIT = 1.10
COMPILED_LIMIT = 1.0
# No slower than torch's own layer, where that one runs.
TORCH_LIMIT = 1.0


def rotated(names: Sequence[T], repetition: int) -> list[T]:
    """``names`` in the order of this repetition: each is first equally often, and not always after the same one.

    Example:
        >>> [rotated("abc", r) for r in range(3)]
        [['a', 'b', 'c'], ['a', 'c', 'b'], ['b', 'c', 'a']]
    """
    start = repetition // 2 % len(names)
    order = [*names[start:], *names[:start]]
    return order if repetition % 2 == 0 else [order[0], *reversed(order[1:])]


def timings(
    seconds: Mapping[str, Sequence[float]], baselines: Sequence[str], not_run: Mapping[str, str]
) -> tuple[Timing, ...]:
    """A `Timing` for each name; first those that ran, each against the baselines that ran in the same repetitions."""
    ran = []
    for name, times in seconds.items():
        p25, middle, p75 = quartiles(times)
        ratios = {b: median_ratio(times, seconds[b]) for b in baselines if b in seconds and b != name}
        ran.append(Timing(name, None, tuple(times), middle, p25, p75, ratios))
    return (*ran, *(Timing(name, reason) for name, reason in not_run.items()))


def summary(rows: Sequence[Row], model: ModelResult | None, device: str, wires: bool = True) -> tuple[Figure, ...]:
    """The figures that the benchmark is for; targets are for fp32 on CPUs, but for that against torch's own layer.

    Those on CPUs are for ranks that wait for each other: without wires the floor is the local layer.
    """
    figures = []
    for dtype in dict.fromkeys(row.dtype for row in rows):
        cpu = wires and device == "cpu" and dtype == "fp32"
        of_dtype = [row for row in rows if row.dtype == dtype]
        limits = {
            "floor": (FLOOR_LIMIT, FLOOR_WORST_LIMIT) if cpu else (None, None),
            "E[x^2]": (MEAN_OF_SQUARES_LIMIT if cpu else None, None),
            "torch": (None, TORCH_LIMIT),
        }
        for baseline, (mean_limit, worst_limit) in limits.items():
            figures += _of_rows(of_dtype, dtype, baseline, mean_limit, worst_limit)
    if model is not None:
        figures += _of_model(model, device == "cpu")
    return tuple(figures)


def _of_rows(
    rows: Sequence[Row], dtype: str, baseline: str, mean_limit: float | None, worst_limit: float | None
) -> list[Figure]:
    ratios = [(ratio, row.label) for row in rows if (ratio := row["syncnorm"].ratio(baseline)) is not None]
    if not ratios:
        return []
    mean, (worst, where) = geometric_mean(ratio for ratio, _ in ratios), max(ratios)
    return [
        Figure(f"syncnorm / {baseline}, {dtype}, geometric mean", mean, mean_limit),
        Figure(f"syncnorm / {baseline}, {dtype}, worst row", worst, worst_limit, where),
    ]


def _of_model(model: ModelResult, cpu: bool) -> list[Figure]:
    figures = []
    for arm in model.arms:
        for baseline, ratio in (arm.ratio_to or {}).items():
            compiled = arm.name.endswith("compiled")
            if arm.name == "ddp+syncnorm" and baseline == "ddp":
                figures.append(Figure("model, ddp+syncnorm / ddp", ratio, MODEL_LIMIT if cpu else None))
            elif arm.name == "ddp+syncnorm":
                figures.append(Figure(f"model, ddp+syncnorm / {baseline}", ratio))
            elif compiled and baseline == "ddp+syncnorm":
                figures.append(Figure("model, ddp+syncnorm compiled / eager", ratio, COMPILED_LIMIT))
    return figures
