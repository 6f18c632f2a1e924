"""A benchmark as a picture: what a step costs against the size of its input."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from syncnorm.tools.bench.records import Benchmark, Row
from syncnorm.tools.report.figures import png
from syncnorm.tools.report.growth_plot import write_growth_plot

# Markers, line styles and greys that differ without colour too; peer -> (label, marker, line style, colour, width).
_STYLES = {
    "E[x^2]": ("E[x²] work-around", "s", ":", "#d55e00", 1.4),
    "torch": ("torch.nn.SyncBatchNorm", "D", "-.", "#cc79a7", 1.4),
    "syncnorm": ("syncnorm", "o", "-", "#000000", 2.0),
    "floor": ("floor: local + bare collectives", "^", "--", "#0072b2", 1.4),
    "local": ("local nn.BatchNorm", "v", (0, (1, 3)), "#777777", 1.4),
}
_TITLES = {"contiguous": "contiguous", "channels_last": "channels last"}


def write_plot(benchmark: Benchmark, path: Path) -> None:
    """Writes a PNG: a panel a memory format, elements of a rank's input against microseconds a step, log-log.

    Shows fp32, or the first dtype where fp32 was not measured. Of growth, cost against ranks.
    """
    if benchmark.settings.what == "growth":
        write_growth_plot(benchmark, path)
        return
    dtypes = {row.dtype for row in benchmark.rows}
    dtype = "fp32" if "fp32" in dtypes or not dtypes else min(dtypes)
    panels = {
        title: [row for row in benchmark.rows if row.dtype == dtype and row.memory_format == name]
        for name, title in _TITLES.items()
    }
    with png(path, (10, 5.2)) as figure:
        axes = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
        for ax, (title, rows) in zip(axes, panels.items(), strict=True):
            _panel(ax, title, rows)
        axes[0].set_ylabel("microseconds a step, forward + backward")
        handles = {
            label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)
        }
        if handles:
            figure.legend(
                handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), frameon=False
            )
        hardware = benchmark.hardware
        figure.suptitle(
            f"Batch norm in {dtype}, {benchmark.settings.world_size} ranks over {hardware.backend}: "
            f"median and middle half of {benchmark.settings.repetitions} repetitions\n"
            f"{hardware.device_name}, {hardware.cpu_count} cores, torch {benchmark.torch_version}, "
            f"syncnorm {benchmark.syncnorm_version}, {benchmark.date[:10]}",
            fontsize=10,
        )


def _panel(ax: Any, title: str, rows: Sequence[Row]) -> None:
    ax.set_title(title, fontsize=11)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter("{x:,.0f}")
    ax.set_xlabel("elements of a rank's input")
    ax.grid(True, which="major", color="#dddddd", linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)
    for name, (label, marker, line, colour, width) in _STYLES.items():
        points = sorted(
            (row.num_elements, timing.median, timing.p25, timing.p75)
            for row in rows
            for timing in row.peers
            if timing.name == name and timing.median and timing.p25 and timing.p75
        )
        if not points:
            continue
        sizes = [size for size, *_ in points]
        medians = [median * 1e6 for _, median, _, _ in points]
        below = [(median - p25) * 1e6 for _, median, p25, _ in points]
        above = [(p75 - median) * 1e6 for _, median, _, p75 in points]
        look = {"color": colour, "linewidth": width}
        fill = colour if name == "syncnorm" else "white"
        points_look = {"marker": marker, "markersize": 6, "markerfacecolor": fill}
        spread = {"yerr": (below, above), "elinewidth": 0.8, "capsize": 2}
        ax.errorbar(sizes, medians, linestyle="none", zorder=4, **look, **points_look, **spread)
        # Shapes of one size differ in width and in sides: the line goes between them.
        at_size = {size: [m for s, m in zip(sizes, medians, strict=True) if s == size] for size in sizes}
        middles = [geometric_mean(each) for each in at_size.values()]
        ax.plot(list(at_size), middles, linestyle=line, zorder=3, **look)
        ax.plot([], [], linestyle=line, label=label, **look, **points_look)
