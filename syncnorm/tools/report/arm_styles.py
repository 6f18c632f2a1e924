"""How the report shows an arm: marker, dashes and color, each of which distinguishes it, and its results as text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from syncnorm.tools.compare.records import ArmResult, MetricInfo
from syncnorm.tools.report.inline_svg import BLUE, BROWN, GRAY, GREEN, INK, ORANGE, PINK, SKY, short_name

Style = tuple[str, Any, str]

_STYLES: dict[str, Style] = {
    "single": ("o", "-", INK),
    "dp": ("v", (0, (1, 1)), GRAY),
    "ddp": ("s", "--", ORANGE),
    "ddp+syncbn": ("D", "-", BLUE),
    "ddp+group": ("^", "-.", GREEN),
    "ddp+layer": ("P", (0, (5, 1, 1, 1, 1, 1)), PINK),
    "ddp+instance": ("X", ":", BROWN),
    "ddp+torch-syncbn": ("*", (0, (8, 3)), SKY),
}
# Of all other arms, in turn.
_MORE_STYLES: tuple[Style, ...] = (
    ("<", (0, (4, 2)), BROWN),
    (">", (0, (2, 2)), GREEN),
    ("h", (0, (6, 2, 2, 2)), PINK),
    ("d", (0, (1, 2)), SKY),
    ("p", (0, (3, 1, 1, 1)), GRAY),
)


# About how many a line has; more would cover it.
MARKERS = 20


def arm_styles(names: Iterable[str]) -> dict[str, Style]:
    """The style of each arm."""
    distinct = list(dict.fromkeys(names))
    others = [name for name in distinct if name not in _STYLES]
    more = {name: _MORE_STYLES[index % len(_MORE_STYLES)] for index, name in enumerate(others)}
    return {name: _STYLES.get(name) or more[name] for name in distinct}


def line_look(name: str, style: Style, points: int = 1) -> dict[str, Any]:
    """``style`` as matplotlib's arguments of a line of ``points`` points, with a label in the legend."""
    marker, dashes, color = style
    return {
        "label": short_name(name),
        "marker": marker,
        "linestyle": dashes,
        "color": color,
        "markersize": 4.5,
        "markevery": max(1, points // MARKERS),
        "linewidth": 1.4,
    }


def finished(arm: ArmResult) -> bool:
    """Whether every seed of ``arm`` has a finite result."""
    return bool(arm.seeds) and all(value is not None for value in arm.results)


def shown(value: float, metric: MetricInfo) -> float:
    """A value of the metric in the unit in which it is shown: percent, or as it is."""
    return 100 * value if metric.share else value


def shown_text(value: float, metric: MetricInfo) -> str:
    """The same as text, without its unit."""
    return f"{100 * value:.1f}" if metric.share else f"{value:.4g}"


def metric_label(metric: MetricInfo) -> str:
    """The metric as a heading: ``Test accuracy, %``."""
    return f"Test {metric.name}{', %' if metric.share else ''}"
