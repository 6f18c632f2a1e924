"""A picture of the norms: for each, a tensor over two ranks, and which of its values share statistics with one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from syncnorm.tools.report.figures import png
from syncnorm.tools.study.footprints import LAYERS, Footprint

# Distinguished by lightness and hatching, not by color.
_SHARED, _ALONE, _EDGE, _HATCH = "#3b4a5a", "#ffffff", "#9a9a9a", "#8a8a8a"
_COLUMNS = 3
# Between channels and between ranks, in cells.
_GAP, _RANK_GAP = 0.6, 0.8
_AXIS_NAMES = {"ranks": "ranks", "samples": "N", "channels": "C", "positions": "spatial"}


def write_norms_plot(footprints: Sequence[Footprint], path: Path) -> None:
    """Writes a PNG with one panel per norm: rows are samples, by rank; columns are spatial positions, by channel."""
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    rows = -(-len(footprints) // _COLUMNS)
    with png(path, (8.8, 0.55 + 2.25 * rows), ConstrainedLayoutEngine(hspace=0.09), dpi=110) as figure:
        axes = figure.subplots(rows, _COLUMNS, squeeze=False).flatten()
        for ax in axes:
            ax.axis("off")
        for ax, footprint in zip(axes, footprints, strict=False):
            _panel(ax, footprint)
        figure.legend(handles=_legend(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)


def described(footprint: Footprint) -> str:
    """What the norm averages over, in one line: ``over ranks, N, spatial: 24 values``."""
    over = []
    for name, reach, length in zip(footprint.reduces_over, _reached(footprint), _lengths(footprint), strict=True):
        over.append(_AXIS_NAMES[name] if reach == length else f"{reach} of {length} {_AXIS_NAMES[name]}")
    return f"over {', '.join(over)}: {len(footprint.moved)} values"


def _reached(footprint: Footprint) -> list[int]:
    return [reach for reach in footprint.reach if reach > 1]


def _lengths(footprint: Footprint) -> list[int]:
    return [length for length, reach in zip(footprint.shape, footprint.reach, strict=True) if reach > 1]


def _panel(ax: Any, footprint: Footprint) -> None:
    from matplotlib.patches import Rectangle

    ranks, samples, channels, positions = footprint.shape
    moved, padding = set(footprint.moved), set(footprint.padding)

    def corner(rank: int, sample: int, channel: int, position: int) -> tuple[float, float]:
        return channel * (positions + _GAP) + position, rank * (samples + _RANK_GAP) + sample

    for index in (
        (r, s, c, p) for r in range(ranks) for s in range(samples) for c in range(channels) for p in range(positions)
    ):
        style: dict[str, Any] = {
            "facecolor": _SHARED if index in moved else _ALONE,
            "edgecolor": _EDGE,
            "linewidth": 0.5,
        }
        if index in padding:
            style |= {"hatch": "///////", "hatch_linewidth": 0.6, "edgecolor": _HATCH}
        ax.add_patch(Rectangle(corner(*index), 1, 1, **style))
    small: dict[str, Any] = {"fontsize": 7, "color": "#555555"}
    x, y = corner(*footprint.changed)
    ax.plot(x + 0.5, y + 0.5, marker="o", color="#ffffff", markersize=3.6)
    for rank in range(ranks):
        _, top = corner(rank, 0, 0, 0)
        ax.text(-2.0, top + samples / 2, f"rank {rank}", rotation=90, ha="right", va="center", fontsize=8)
        for sample in range(samples):
            ax.text(-0.4, top + sample + 0.5, f"n{sample}", ha="right", va="center", **small)
    for channel in range(channels):
        left, _ = corner(0, 0, channel, 0)
        ax.text(left + positions / 2, -0.35, f"c{channel}", ha="center", va="bottom", **small)
    right, bottom = corner(ranks - 1, samples - 1, channels - 1, positions - 1)
    ax.set_xlim(-3.8, right + 1.2)
    ax.set_ylim(bottom + 1.2, -1.6)
    ax.set_title(LAYERS[footprint.norm].title, fontsize=10.5, fontweight="bold", pad=3)
    ax.text(right / 2 + 0.5, bottom + 1.5, described(footprint), ha="center", va="top", fontsize=8.5)


def _legend() -> list[Any]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    ring: dict[str, Any] = {
        "marker": "o",
        "markersize": 4,
        "markerfacecolor": "#ffffff",
        "markeredgecolor": "#000000",
    }
    return [
        Line2D([], [], linestyle="none", label="the value that was changed", **ring),
        Patch(facecolor=_SHARED, edgecolor=_EDGE, label="output changes: shares its statistics"),
        Patch(facecolor=_ALONE, edgecolor=_EDGE, label="output does not change"),
        Patch(facecolor=_ALONE, edgecolor=_HATCH, hatch="///////", label="padding"),
    ]
