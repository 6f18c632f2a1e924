"""Growth as a picture: what a layer costs against ranks, measured, and what a model of many layers would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from syncnorm.tools.bench.growth_records import Growth, Simulation
from syncnorm.tools.bench.records import Benchmark
from syncnorm.tools.report.figures import png

# Differ without colour too.
_MARKERS = ("o", "s", "^", "D", "v", "P")
_GREYS = ("#000000", "#0072b2", "#d55e00", "#777777", "#cc79a7", "#009e73")
_ARRANGEMENTS = (
    ("flat", "flat", "o", "-", "#000000"),
    ("two_level", "two-level (model only)", "s", "--", "#0072b2"),
    ("grouped", "groups of {} (other statistics)", "^", ":", "#d55e00"),
)


def write_growth_plot(benchmark: Benchmark, path: Path) -> None:
    """Writes a PNG: a panel of the measured layers, a line per number of channels, and one of the simulation."""
    growth, simulation = benchmark.growth, benchmark.simulation
    panels = (growth is not None) + (simulation is not None)
    with png(path, (5.5 * panels, 5)) as figure:
        axes = list(figure.subplots(1, panels, squeeze=False)[0])
        if growth is not None:
            _measured(axes.pop(0), growth, benchmark.hardware.cpu_count)
        if simulation is not None:
            _simulated(axes.pop(0), simulation)
        hardware = benchmark.hardware
        figure.suptitle(
            f"{hardware.device_name}, {hardware.cpu_count} cores, torch {benchmark.torch_version}, "
            f"syncnorm {benchmark.syncnorm_version}, {benchmark.date[:10]}",
            fontsize=9,
        )


def _measured(ax: Any, growth: Growth, cores: int) -> None:
    for index, channels in enumerate(dict.fromkeys(cost.size for cost in growth.layers)):
        costs = [cost for cost in growth.layers if cost.size == channels]
        medians = [cost.median * 1e6 for cost in costs]
        spread = ([(c.median - c.p25) * 1e6 for c in costs], [(c.p75 - c.median) * 1e6 for c in costs])
        look = {"color": _GREYS[index % len(_GREYS)], "marker": _MARKERS[index % len(_MARKERS)], "capsize": 2}
        ax.errorbar([c.world_size for c in costs], medians, yerr=spread, label=f"C = {channels}", **look)
    _frame(ax, "measured: one synced layer over gloo", "microseconds a step, forward + backward")
    ax.set_xticks(growth.worlds, [str(w) for w in growth.worlds])
    if growth.worlds[-1] > cores:
        ax.axvspan(cores + 0.5, growth.worlds[-1] + 0.5, color="#eeeeee", zorder=0, label="more ranks than cores")
    ax.legend(facecolor="white", edgecolor="none", framealpha=1)


def _simulated(ax: Any, simulation: Simulation) -> None:
    for name, label, marker, line, colour in _ARRANGEMENTS:
        points = [(w.world_size, getattr(w.model, name)) for w in simulation.worlds]
        points = [(w, seconds * 1e3) for w, seconds in points if seconds is not None]
        if points:
            look = {
                "color": colour,
                "marker": marker,
                "linestyle": line,
                "label": label.format(simulation.group_size),
            }
            ax.plot(*zip(*points, strict=True), **look)
    layers = len(simulation.model_channels)
    _frame(ax, f"simulated: {layers} layers of {simulation.model_name}", "milliseconds a step, over gloo")
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter("{x:,.0f}")
    ax.legend(facecolor="white", edgecolor="none", framealpha=1)


def _frame(ax: Any, title: str, ylabel: str) -> None:
    ax.set_title(title, fontsize=10)
    ax.set_xlabel("ranks")
    ax.set_ylabel(ylabel)
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter("{x:,g}")
    ax.grid(True, which="major", color="#dddddd", linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)
