"""A study as a plot: one panel per view, one line per condition, the seeds as points."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil
from pathlib import Path
from statistics import fmean
from typing import Any

from syncnorm.tools.report.figures import legend_columns, log_scale, png
from syncnorm.tools.report.study_text import sample
from syncnorm.tools.study.findings import levels, std, text
from syncnorm.tools.study.records import Study, StudyRow, Value, View

# Markers, line styles and lightness differ too, so that the lines can be distinguished in black and white.
_STYLES = (
    ("o", "-", "#000000"),
    ("s", "--", "#d55e00"),
    ("^", "-.", "#0072b2"),
    ("D", ":", "#cc79a7"),
    ("v", (0, (5, 1, 1, 1, 1, 1)), "#009e73"),
    ("P", (0, (1, 3)), "#777777"),
    ("X", (0, (8, 3)), "#56b4e9"),
    ("*", (0, (3, 5)), "#8c510a"),
)
_COLUMNS = 3
# Fraction of the distance between two neighbors on the x axis over which the points of the lines are spread.
_CATEGORY_WIDTH, _NUMBER_WIDTH = 0.6, 0.12
# Lines that end within this fraction of the panel's height get a close-up of their ends.
_CLOSE = 0.1


@dataclass(frozen=True)
class _Panel:
    """What a panel shows: the rows of ``view``, their levels, and the style of each line."""

    view: View
    rows: Sequence[StudyRow]
    across: Sequence[Value]
    lines: Sequence[Value]
    styles: Mapping[Value, Any]

    def points(self, line: Value) -> Iterator[tuple[Value, list[float]]]:
        """A column and the values of its seeds, for each column in which ``line`` has some."""
        for column in self.across:
            if values := sample(self.rows, self.view, line, column):
                yield column, values

    def x(self, column: Value, line: Value) -> float:
        """Where the point is drawn: next to those of the other lines at the same column."""
        offset = (self.lines.index(line) + 0.5) / len(self.lines) - 0.5
        if self.view.scale == "category":
            return self.across.index(column) + _CATEGORY_WIDTH * offset
        numbers = sorted(float(each) for each in self.across)
        neighbors = list(pairwise(numbers))
        if self.view.scale == "log":
            ratio = min((b / a for a, b in neighbors), default=1.0)
            return float(float(column) * ratio ** (_NUMBER_WIDTH * offset))
        return float(column) + _NUMBER_WIDTH * offset * min((b - a for a, b in neighbors), default=1.0)


def write_plot(study: Study, path: Path) -> None:
    """Writes a PNG: the mean over the seeds as a line, their standard deviation as bars, each seed as a point.

    A single view whose lines end close to each other gets a second panel, which shows their ends.
    """
    panels = _panels(study)
    closeup = len(panels) == 1 and _ends_close(panels[0])
    columns = 2 if len(panels) == 4 or closeup else min(len(panels), _COLUMNS)
    rows = ceil(len(panels) / columns)
    with png(path, (max(7.0, 4.6 * columns), 1.2 + 3.9 * rows)) as figure:
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        for ax, panel in zip(axes, panels, strict=False):
            _draw(ax, panel)
        for ax in axes[len(panels) + closeup :]:
            ax.set_visible(False)
        _share_y(axes, panels)
        if closeup:
            _draw_ends(axes[1], panels[0])
        handles = {
            label: handle for ax in figure.axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)
        }
        if handles:
            figure.legend(
                handles.values(),
                handles.keys(),
                loc="outside lower center",
                ncols=legend_columns(list(handles), figure.get_figwidth()),
                frameon=False,
            )
        figure.suptitle("\n".join(textwrap.wrap(study.question, 30 + 45 * columns)), fontsize=11)


def _panels(study: Study) -> list[_Panel]:
    # A name has the same style in all panels, even if a panel lacks some names.
    shown = [(view, [row for row in study.rows if view.shows(row)]) for view in study.views]
    names = list(dict.fromkeys(name for view, rows in shown for name in levels(rows, view.lines)))
    styles = {name: _STYLES[index % len(_STYLES)] for index, name in enumerate(names)}
    return [_Panel(view, rows, levels(rows, view.across), levels(rows, view.lines), styles) for view, rows in shown]


def _share_y(axes: Sequence[Any], panels: Sequence[_Panel]) -> None:
    """Gives panels of the same measure the same y axis."""
    for measure in {panel.view.measure for panel in panels}:
        same = [ax for ax, panel in zip(axes, panels, strict=False) if panel.view.measure == measure]
        low, high = min(ax.get_ylim()[0] for ax in same), max(ax.get_ylim()[1] for ax in same)
        for ax in same:
            ax.set_ylim(low, high)


def _draw(ax: Any, panel: _Panel) -> None:
    view = panel.view
    _frame(ax, view.title, view.across, f"{view.measure}, %" if view.unit == "percent" else view.measure)
    if view.scale == "log":
        log_scale(ax.xaxis)
    if view.scale == "category":
        ax.set_xticks(range(len(panel.across)), [text(column) for column in panel.across])
        ax.set_xlim(-0.5, len(panel.across) - 0.5)
    else:
        ax.set_xticks([float(column) for column in panel.across], [text(column) for column in panel.across])
        ax.minorticks_off()
    if view.scale == "category" and len(panel.lines) == 1:
        _draw_bars(ax, panel)
        return
    for line in panel.lines:
        points = list(panel.points(line))
        at = [panel.x(column, line) for column, _ in points]
        _draw_points(ax, panel, line, at, [values for _, values in points], connect=view.scale != "category")
    if view.unit == "number":
        ax.set_ylim(bottom=0)
    if view.unit == "ratio":
        ax.axhline(1, color="#000000", linewidth=1.2, zorder=1)
        ax.margins(y=0.08)


def _draw_points(
    ax: Any, panel: _Panel, line: Value, at: Sequence[float], samples: Sequence[Sequence[float]], connect: bool
) -> None:
    marker, dashes, color = panel.styles[line]
    ax.errorbar(
        at,
        [fmean(values) for values in samples],
        yerr=[std(values) for values in samples],
        label=text(line),
        marker=marker,
        linestyle=dashes if connect else "none",
        color=color,
        markerfacecolor="white" if panel.lines.index(line) else color,
        markersize=6,
        linewidth=1.5,
        capsize=2.5,
        elinewidth=0.8,
    )
    for x, values in zip(at, samples, strict=True):
        ax.plot([x] * len(values), values, ".", color=color, markersize=2.5)


def _draw_bars(ax: Any, panel: _Panel) -> None:
    """A view of one line over categories: a bar from zero for each, with its value."""
    points = list(panel.points(panel.lines[0]))
    at, means = [panel.across.index(column) for column, _ in points], [fmean(values) for _, values in points]
    spread = [std(values) for _, values in points]
    ax.bar(at, means, 0.5, yerr=spread, color="#d9d9d9", edgecolor="#000000", linewidth=0.8, capsize=2.5)
    digits = 0 if panel.view.unit == "percent" else 2
    for x, mean, deviation in zip(at, means, spread, strict=True):
        ax.annotate(f"{mean:.{digits}f}", (x, mean + deviation), (0, 4), textcoords="offset points", ha="center")
    tallest = max(mean + deviation for mean, deviation in zip(means, spread, strict=True))
    ax.set_ylim(0, 1.12 * tallest or 1)  # room for the value on top


def _ends_close(panel: _Panel) -> bool:
    """Whether the lines differ at the last column, but too little to be seen beside the other columns."""
    if panel.view.scale == "category" or len(panel.across) < 2:
        return False
    everything = [value for line in panel.lines for _, values in panel.points(line) for value in values]
    ends = [fmean(values) for _, values in _ends(panel)]
    return 0 < max(ends) - min(ends) < _CLOSE * (max(everything) - min(everything))


def _ends(panel: _Panel) -> list[tuple[Value, list[float]]]:
    """Each line and its seeds at the last column."""
    points = [(line, sample(panel.rows, panel.view, line, panel.across[-1])) for line in panel.lines]
    return [(line, values) for line, values in points if values]


def _draw_ends(ax: Any, panel: _Panel) -> None:
    _frame(ax, f"Close-up of the end: {panel.view.across} {text(panel.across[-1])}", "", "")
    ends = _ends(panel)
    for index, (line, values) in enumerate(ends):
        _draw_points(ax, panel, line, [index], [values], connect=False)
    ax.set_xticks(range(len(ends)), [text(line) for line, _ in ends])
    ax.set_xlim(-0.5, len(ends) - 0.5)


def _frame(ax: Any, title: str, xlabel: str, ylabel: str) -> None:
    ax.set_title("\n".join(textwrap.wrap(title, 52)), fontsize=10)
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)
    ax.grid(True, color="#dddddd", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
