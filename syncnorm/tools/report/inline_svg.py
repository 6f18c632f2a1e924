"""Plots as SVG inside of a page: their texts have the page's font, and their colors are those of the page."""

from __future__ import annotations

import re
from collections.abc import Callable
from io import BytesIO
from math import ceil
from typing import Any, NamedTuple

from rich.cells import cell_len, set_cell_size

from syncnorm.tools.report.figures import figure, legend_columns

# matplotlib draws in these colors, and the page replaces each by its own variable, which is lighter on a dark screen.
INK, PAPER, GRID, BAR, PALE_BAR = "#000000", "#ffffff", "#dddddd", "#b8b8b8", "#e8e8e8"
ORANGE, BLUE, GREEN, PINK, BROWN, SKY, GRAY = (
    "#d55e00",
    "#0072b2",
    "#009e73",
    "#cc79a7",
    "#8c510a",
    "#56b4e9",
    "#777777",
)
VARIABLES = {
    INK: "ink",
    PAPER: "paper",
    GRID: "grid",
    BAR: "bar",
    PALE_BAR: "pale-bar",
    ORANGE: "orange",
    BLUE: "blue",
    GREEN: "green",
    PINK: "pink",
    BROWN: "brown",
    SKY: "sky",
    GRAY: "gray",
}
# A phone shows 4.6 inches at about full size.
WIDTH, HEIGHT = 4.6, 3.1
_FONT_POINTS, _LEGEND_POINTS = 9.0, 8.0
_LEGEND_ROW = 0.17
# Between ticks of a linear x axis, so that labels such as -0.015 do not overlap.
_X_INTERVALS = 6
# Columns of a name in a plot; the tables have the whole name.
_NAME_COLUMNS = 26


class Plot(NamedTuple):
    """A drawing with its title, a caption that explains how to read it, and in words what it shows."""

    title: str
    svg: str
    caption: str
    shows: str


def inline_svg(draw: Callable[[Any], None], height: float = HEIGHT, legend: bool = True) -> str:
    """What ``draw`` draws in a matplotlib ``Axes``, as an ``<svg>`` element for `with_own_ids`.

    Texts stay texts: they are selectable, and a browser has fonts for characters that matplotlib's lacks.
    """
    from matplotlib.ticker import MaxNLocator

    file = BytesIO()
    look = {"font.size": _FONT_POINTS, "hatch.linewidth": 0.6, "svg.fonttype": "none", "svg.hashsalt": "syncnorm"}
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with figure(file, (WIDTH, height), look, "constrained", format="svg", metadata=no_metadata) as drawn:
        ax = drawn.subplots()
        draw(ax)
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="both", color=GRID, linewidth=0.6)
        ax.set_axisbelow(True)
        if isinstance(ax.xaxis.get_major_locator(), MaxNLocator):
            ax.xaxis.get_major_locator().set_params(nbins=_X_INTERVALS)
        handles, labels = ax.get_legend_handles_labels()
        if legend and handles:
            columns = min(3, legend_columns(labels, WIDTH, _LEGEND_POINTS))
            style = {"frameon": False, "fontsize": _LEGEND_POINTS, "columnspacing": 1.2}
            drawn.legend(handles, labels, loc="outside lower center", ncols=columns, **style)
            # A long legend makes the picture higher, not the axes lower.
            drawn.set_figheight(height + _LEGEND_ROW * max(0, ceil(len(labels) / columns) - 2))
    return _for_page(file.getvalue().decode())


def _for_page(svg: str) -> str:
    element = svg[svg.index("<svg") :]
    width, height = re.search(r'width="([\d.]+)pt" height="([\d.]+)pt"', element).groups()  # type: ignore[union-attr]
    opening, rest = element.split(">", 1)
    opening = f'<svg viewBox="0 0 {width} {height}" xmlns:xlink="http://www.w3.org/1999/xlink"'
    # matplotlib's style sheet would apply to the whole page, which has these rules for plots.
    rest = re.sub(r"<style.*?</style>", "", rest, flags=re.DOTALL)
    return re.sub("<[^<>]*>", lambda tag: _in_page_colors(tag[0]), f"{opening}>{rest}")


def _in_page_colors(tag: str) -> str:
    """A tag whose colors are variables and whose texts have the font of the page."""
    tag = re.sub(r"font-family: [^;\"]*; ", "", tag)
    tag = re.sub(r"font: (?:[\w ]+ )?([\d.]+px) [^;\"]*", r"font-size: \1", tag)  # so do earlier versions write it
    tag = re.sub(r'fill="(#[0-9a-f]{6})"', r'style="fill: \1"', tag)
    return re.sub(r"(fill|stroke): (#[0-9a-f]{6})", lambda m: f"{m[1]}: var(--{VARIABLES[m[2]]})", tag)


def with_own_ids(svg: str, prefix: str) -> str:
    """``svg`` with ``prefix`` before every id and every reference to one, so that several fit in a page."""

    def renamed(tag: re.Match[str]) -> str:
        return re.sub(r'(\bid="|="#|url\(#)', rf"\g<1>{prefix}-", tag[0])

    return re.sub("<[^<>]*>", renamed, svg)


def short_name(name: str) -> str:
    """A name for a plot: on one line, without the middle if it is long."""
    name = " ".join(name.split())
    if cell_len(name) <= _NAME_COLUMNS:
        return name
    half = (_NAME_COLUMNS - 1) // 2
    return f"{set_cell_size(name, half).rstrip()}…{set_cell_size(name[::-1], half).rstrip()[::-1]}"
