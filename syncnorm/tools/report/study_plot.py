"""A study as a plot: one panel per view, one line per condition, the seeds as points."""

from __future__ import annotations

import textwrap
from math import ceil
from pathlib import Path
from statistics import fmean
from typing import Any

from syncnorm.tools.report.figures import png
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
# Fraction of the distance between two categories over which the points of the lines are spread.
_CATEGORY_WIDTH = 0.6


def write_plot(study: Study, path: Path) -> None:
    """Writes a PNG: the mean over the seeds as a line, their standard deviation as bars, each seed as a point."""
    columns = 2 if len(study.views) == 4 else min(len(study.views), _COLUMNS)
    rows = ceil(len(study.views) / columns)
    with png(path, (max(7.0, 4.6 * columns), 1.2 + 3.9 * rows)) as figure:
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        # A name has the same style in all panels, even if a panel lacks some names.
        names = list(dict.fromkeys(name for view in study.views for name in levels(_shown(study, view), view.lines)))
        styles = {name: _STYLES[index % len(_STYLES)] for index, name in enumerate(names)}
        for ax, view in zip(axes, study.views, strict=False):
            _panel(ax, study, view, styles)
        for ax in axes[len(study.views) :]:
            ax.set_visible(False)
        for measure in {view.measure for view in study.views}:
            # Panels of the same measure have the same y axis.
            same = [ax for ax, view in zip(axes, study.views, strict=False) if view.measure == measure]
            low, high = min(ax.get_ylim()[0] for ax in same), max(ax.get_ylim()[1] for ax in same)
            for ax in same:
                ax.set_ylim(low, high)
        handles = {
            label: handle for ax in figure.axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)
        }
        if handles:
            figure.legend(
                handles.values(),
                handles.keys(),
                loc="outside lower center",
                ncols=_legend_columns(list(handles), figure.get_figwidth()),
                frameon=False,
            )
        figure.suptitle("\n".join(textwrap.wrap(study.question, 30 + 45 * columns)), fontsize=11)


def _legend_columns(labels: list[str], width: float) -> int:
    """How many fit next to each other in ``width`` inches: about 0.1 inches per letter and 0.7 per marker."""
    return max(1, min(len(labels), int(width / (0.7 + 0.1 * max(map(len, labels))))))


def _shown(study: Study, view: View) -> list[StudyRow]:
    return [row for row in study.rows if view.shows(row)]


def _panel(ax: Any, study: Study, view: View, styles: dict[Value, Any]) -> None:
    rows = _shown(study, view)
    across, names = levels(rows, view.across), levels(rows, view.lines)
    ax.set_title("\n".join(textwrap.wrap(view.title, 48)), fontsize=10)
    ax.set_xlabel(view.across)
    ax.set_ylabel(f"{view.measure}, %" if view.unit == "percent" else view.measure)
    ax.grid(True, color="#dddddd", linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)
    if view.scale == "log":
        ax.set_xscale("log")
    if view.scale != "linear":
        ax.set_xticks([_x(view, across, column) for column in across], [text(column) for column in across])
        ax.minorticks_off()
    for index, name in enumerate(names):
        marker, line, color = styles[name]
        points = [(column, values) for column in across if (values := sample(rows, view, name, column))]
        # The points of a category are spread around it, and no line connects categories.
        shift = 0.0 if view.scale != "category" else _CATEGORY_WIDTH * ((index + 0.5) / len(names) - 0.5)
        x = [_x(view, across, column) + shift for column, _ in points]
        ax.errorbar(
            x,
            [fmean(values) for _, values in points],
            yerr=[std(values) for _, values in points],
            label=text(name),
            marker=marker,
            linestyle="none" if view.scale == "category" else line,
            color=color,
            markerfacecolor="white" if index else color,
            markersize=6,
            linewidth=1.5,
            capsize=2.5,
            elinewidth=0.8,
        )
        for at, (_, values) in zip(x, points, strict=True):
            ax.plot([at] * len(values), values, ".", color=color, markersize=2.5)
    if view.unit == "number":
        ax.set_ylim(bottom=0)


def _x(view: View, across: list[Value], column: Value) -> float:
    return float(across.index(column)) if view.scale == "category" else float(column)
