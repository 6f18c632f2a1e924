"""A study as a picture: a panel a view, a line a condition, the seeds as points."""

from __future__ import annotations

import textwrap
from math import ceil
from pathlib import Path
from statistics import fmean
from typing import Any

from syncnorm.tools.report.figures import png
from syncnorm.tools.report.study_tables import sample, text
from syncnorm.tools.study.records import Study, Value, View
from syncnorm.tools.study.statistics import levels, spread

# Marker, line style and grey differ too, so that a print in black and white still tells the lines apart.
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
# Of the distance between two categories, that over which the lines' points are laid out.
_ROOM = 0.6


def write_plot(study: Study, path: Path) -> None:
    """Writes a PNG: mean of the seeds as a line, their standard deviation as bars, each of them as a small point."""
    columns = 2 if len(study.views) == 4 else min(len(study.views), _COLUMNS)
    rows = ceil(len(study.views) / columns)
    with png(path, (max(7.0, 4.6 * columns), 1.2 + 3.9 * rows)) as figure:
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        # One look a name in all panels, also where a panel lacks some.
        names = list(dict.fromkeys(name for view in study.views for name in levels(_shown(study, view), view.lines)))
        looks = {name: _STYLES[index % len(_STYLES)] for index, name in enumerate(names)}
        for ax, view in zip(axes, study.views, strict=False):
            _panel(ax, study, view, looks)
        for ax in axes[len(study.views) :]:
            ax.set_visible(False)
        for measure in {view.measure for view in study.views}:
            # What is measured alike is drawn to one scale.
            alike = [ax for ax, view in zip(axes, study.views, strict=False) if view.measure == measure]
            low, high = min(ax.get_ylim()[0] for ax in alike), max(ax.get_ylim()[1] for ax in alike)
            for ax in alike:
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
    """As many as fit beside each other in ``width`` inches, a letter being some 0.1 of one and a marker 0.7."""
    return max(1, min(len(labels), int(width / (0.7 + 0.1 * max(map(len, labels))))))


def _shown(study: Study, view: View) -> list[Any]:
    return [row for row in study.rows if view.shows(row)]


def _panel(ax: Any, study: Study, view: View, looks: dict[Value, Any]) -> None:
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
        marker, line, colour = looks[name]
        points = [(column, values) for column in across if (values := sample(rows, view, name, column))]
        # Categories have room beside them, and nothing between them that a line could go through.
        shift = 0.0 if view.scale != "category" else _ROOM * ((index + 0.5) / len(names) - 0.5)
        x = [_x(view, across, column) + shift for column, _ in points]
        ax.errorbar(
            x,
            [fmean(values) for _, values in points],
            yerr=[spread(values) for _, values in points],
            label=text(name),
            marker=marker,
            linestyle="none" if view.scale == "category" else line,
            color=colour,
            markerfacecolor="white" if index else colour,
            markersize=6,
            linewidth=1.5,
            capsize=2.5,
            elinewidth=0.8,
        )
        for at, (_, values) in zip(x, points, strict=True):
            ax.plot([at] * len(values), values, ".", color=colour, markersize=2.5)
    if view.unit == "number":
        ax.set_ylim(bottom=0)


def _x(view: View, across: list[Value], column: Value) -> float:
    return float(across.index(column)) if view.scale == "category" else float(column)
