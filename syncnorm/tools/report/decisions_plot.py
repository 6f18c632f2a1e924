"""The decisions of a comparison as a plot: each difference with its interval, beside zero and the margin."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Any

from syncnorm.tools.compare.paired import essential
from syncnorm.tools.compare.records import Comparison, Decision
from syncnorm.tools.report.inline_svg import BLUE, GRAY, HEIGHT, INK, ORANGE, PALE_BAR, Plot, inline_svg, short_name

_STYLES = {"better": (">", BLUE), "worse": ("<", ORANGE), "equivalent": ("s", INK), "undecided": ("o", GRAY)}
# Intervals are cut off beyond this multiple of those on which the advice depends: an arm that fails would make all
# other differences too small to see.
_OFF_SCALE = 2.0


def plot_decisions(comparison: Comparison) -> Plot | None:
    """The decisions that have an interval; None if none has."""
    found = [each for each in comparison.decisions if each.low is not None and each.high is not None]
    if not found:
        return None
    metric = comparison.task.metric
    edge = _edge(found)

    def draw(ax: Any) -> None:
        for place, decision in enumerate(reversed(found)):
            _draw_decision(ax, place, decision, edge)
        values = [value for each in found for value in (each.low or 0.0, each.high or 0.0)]
        if max(map(abs, values)) > edge:
            low, high = min(_clipped(value, edge) for value in values), max(_clipped(value, edge) for value in values)
            ax.set_xlim(min(low, 0) - 0.05 * edge, max(high, 0) + 0.05 * edge)
        ax.axvline(0, color=INK, linewidth=0.8)
        ax.set_yticks(range(len(found)), [_pair(each) for each in reversed(found)])
        ax.set_ylim(-0.7, len(found) - 0.3)
        ax.set_xlabel(f"difference, {'percentage points' if metric.share else metric.name}: better is to the right")

    caption = (
        "The difference of two arms and its confidence interval. Clear of zero: better or worse. Within the shaded "
        "margin: equivalent. Otherwise undecided."
    )
    if any(abs(each.difference) > edge for each in found):
        caption += " A number is that of a difference beyond the edge."
    svg = inline_svg(draw, max(HEIGHT * 0.7, 0.42 * len(found) + 0.8), legend=False)
    return Plot("Decisions", svg, caption, "; ".join(map(_in_words, found)))


def _edge(decisions: Sequence[Decision]) -> float:
    reach = [abs(end or 0.0) for each in decisions if essential(each) for end in (each.low, each.high, each.margin)]
    return _OFF_SCALE * max(reach, default=0.0) or inf


def _clipped(value: float, edge: float) -> float:
    return min(max(value, -edge), edge)


def _draw_decision(ax: Any, place: int, decision: Decision, edge: float) -> None:
    margin, (marker, color) = decision.margin, _STYLES[decision.kind]
    ax.fill_betweenx([place - 0.36, place + 0.36], -margin, margin, color=PALE_BAR, linewidth=0)
    ax.plot([decision.low, decision.high], [place, place], "|-", color=INK, linewidth=1.4, markersize=7)
    at = _clipped(decision.difference, edge)
    ax.plot(at, place, marker, color=color, markersize=7)
    if at != decision.difference:
        inward = 1 if at < 0 else -1
        look = {"ha": "left" if at < 0 else "right", "fontsize": 7.5}
        number = f"{decision.difference:+.3g}"
        ax.annotate(number, (at, place), xytext=(8 * inward, 4), textcoords="offset points", **look)


def _pair(decision: Decision) -> str:
    return f"{short_name(decision.arm)}\nvs. {short_name(decision.other)}"


def _in_words(decision: Decision) -> str:
    return (
        f"{decision.arm} compared with {decision.other}: {decision.kind}, {decision.difference:.4g} "
        f"({decision.low:.4g} to {decision.high:.4g})"
    )
