"""A benchmark as a plot: the time of a step by the size of its input, or by the number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from syncnorm.tools.bench.contenders import LOCAL, LOCAL_AND_COLLECTIVES, MEAN_OF_SQUARES, SYNCNORM, TORCH
from syncnorm.tools.bench.records import SCALING, Benchmark, LayerRow
from syncnorm.tools.bench.scaling_records import Scaling, Simulation
from syncnorm.tools.report.figures import log_scale, png

# Markers and line styles that can be distinguished without color, too.
# Contender -> (label, marker, line style, color, line width).
_STYLES = {
    MEAN_OF_SQUARES.name: ("E[x²] workaround", "s", ":", "#d55e00", 1.4),
    TORCH.name: ("torch.nn.SyncBatchNorm", "D", "-.", "#cc79a7", 1.4),
    SYNCNORM.name: ("syncnorm", "o", "-", "#000000", 2.0),
    LOCAL_AND_COLLECTIVES.name: ("local + bare collectives", "^", "--", "#0072b2", 1.4),
    LOCAL.name: ("local nn.BatchNorm", "v", (0, (1, 3)), "#777777", 1.4),
}
_TITLES = {"contiguous": "contiguous", "channels_last": "channels last"}
# Of the scaling plot.
_MARKERS = ("o", "s", "^", "D", "v", "P")
_COLORS = ("#000000", "#0072b2", "#d55e00", "#777777", "#cc79a7", "#009e73")
_ARRANGEMENTS = (
    ("flat", "flat", "o", "-", "#000000"),
    ("two_level", "two-level (model only)", "s", "--", "#0072b2"),
    ("grouped", "groups of {} (other statistics)", "^", ":", "#d55e00"),
)


def write_plot(benchmark: Benchmark, path: Path) -> None:
    """Writes a PNG. Of layers: microseconds per step by the elements of a rank's input, a panel per memory format.

    Shows fp32, or the first dtype if fp32 was not measured. Of scaling: the cost by the number of ranks.
    """
    if benchmark.settings.what == SCALING:
        _write_scaling(benchmark, path)
    else:
        _write_layers(benchmark, path)


def _write_layers(benchmark: Benchmark, path: Path) -> None:
    dtypes = {row.dtype for row in benchmark.rows}
    dtype = "fp32" if "fp32" in dtypes or not dtypes else min(dtypes)
    panels = {
        title: [row for row in benchmark.rows if row.dtype == dtype and row.memory_format == name]
        for name, title in _TITLES.items()
    }
    with png(path, (10, 5.2)) as figure:
        axes = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
        for ax, (title, rows) in zip(axes, panels.items(), strict=True):
            _layer_panel(ax, title, rows)
        axes[0].set_ylabel("microseconds per step, forward + backward")
        handles = {
            label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)
        }
        if handles:
            figure.legend(
                handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), frameon=False
            )
        timed = "call by call" if all(row.calls for row in benchmark.rows) else "in blocks"
        figure.suptitle(
            f"Batch norm in {dtype}, {benchmark.settings.world_size} ranks over {benchmark.hardware.backend}, timed "
            f"{timed}: median and middle half\n{_provenance(benchmark)}",
            fontsize=10,
        )


def _layer_panel(ax: Any, title: str, rows: Sequence[LayerRow]) -> None:
    ax.set_title(title, fontsize=11)
    log_scale(ax.xaxis)
    log_scale(ax.yaxis)
    ax.set_xlabel("elements of the input of a rank")
    ax.grid(True, which="major", color="#dddddd", linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)
    for name, (label, marker, line, color, width) in _STYLES.items():
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
        look = {"color": color, "linewidth": width}
        fill = color if name == "syncnorm" else "white"
        points_look = {"marker": marker, "markersize": 6, "markerfacecolor": fill}
        spread = {"yerr": (below, above), "elinewidth": 0.8, "capsize": 2}
        ax.errorbar(sizes, medians, linestyle="none", zorder=4, **look, **points_look, **spread)
        # Shapes with the same number of elements may differ: the line goes through their mean.
        at_size = {size: [m for s, m in zip(sizes, medians, strict=True) if s == size] for size in sizes}
        middles = [geometric_mean(each) for each in at_size.values()]
        ax.plot(list(at_size), middles, linestyle=line, zorder=3, **look)
        ax.plot([], [], linestyle=line, label=label, **look, **points_look)


def _write_scaling(benchmark: Benchmark, path: Path) -> None:
    """One panel with the measured layers, a line per number of channels, and one with the simulation."""
    scaling, simulation = benchmark.growth, benchmark.simulation
    panels = (scaling is not None) + (simulation is not None)
    with png(path, (5.5 * panels, 5)) as figure:
        axes = list(figure.subplots(1, panels, squeeze=False)[0])
        if scaling is not None:
            _measured_panel(axes.pop(0), scaling, benchmark.hardware.cpu_count)
        if simulation is not None:
            _simulated_panel(axes.pop(0), simulation)
        figure.suptitle(_provenance(benchmark), fontsize=9)


def _measured_panel(ax: Any, scaling: Scaling, cores: int) -> None:
    for index, channels in enumerate(dict.fromkeys(cost.size for cost in scaling.layers)):
        costs = [cost for cost in scaling.layers if cost.size == channels]
        medians = [cost.median * 1e6 for cost in costs]
        spread = ([(c.median - c.p25) * 1e6 for c in costs], [(c.p75 - c.median) * 1e6 for c in costs])
        look = {"color": _COLORS[index % len(_COLORS)], "marker": _MARKERS[index % len(_MARKERS)], "capsize": 2}
        ax.errorbar([c.world_size for c in costs], medians, yerr=spread, label=f"C = {channels}", **look)
    _frame(ax, "measured: one synchronized layer over gloo", "microseconds per step, forward + backward")
    ax.set_xticks(scaling.worlds, [str(w) for w in scaling.worlds])
    if scaling.worlds[-1] > cores:
        ax.axvspan(cores + 0.5, scaling.worlds[-1] + 0.5, color="#eeeeee", zorder=0, label="more ranks than cores")
    ax.legend(facecolor="white", edgecolor="none", framealpha=1)


def _simulated_panel(ax: Any, simulation: Simulation) -> None:
    for name, label, marker, line, color in _ARRANGEMENTS:
        points = [(w.world_size, getattr(w.model, name)) for w in simulation.worlds]
        points = [(w, seconds * 1e3) for w, seconds in points if seconds is not None]
        if points:
            look = {
                "color": color,
                "marker": marker,
                "linestyle": line,
                "label": label.format(simulation.group_size),
            }
            ax.plot(*zip(*points, strict=True), **look)
    layers = len(simulation.model_channels)
    _frame(ax, f"simulated: {layers} layers of {simulation.model_name}", "milliseconds per step, over gloo")
    log_scale(ax.xaxis, base=2)
    ax.legend(facecolor="white", edgecolor="none", framealpha=1)


def _frame(ax: Any, title: str, ylabel: str) -> None:
    ax.set_title(title, fontsize=10)
    ax.set_xlabel("ranks")
    ax.set_ylabel(ylabel)
    log_scale(ax.yaxis)
    ax.grid(True, which="major", color="#dddddd", linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)


def _provenance(benchmark: Benchmark) -> str:
    hardware = benchmark.hardware
    return (
        f"{hardware.device_name}, {hardware.cpu_count} cores, torch {benchmark.torch_version}, "
        f"syncnorm {benchmark.syncnorm_version}, {benchmark.date[:10]}"
    )
