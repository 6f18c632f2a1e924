"""The pictures of a comparison's report, each an SVG that is legible on a phone and in black and white."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from io import BytesIO
from statistics import fmean, stdev
from typing import Any, NamedTuple

from syncnorm.tools.compare.evidence import ROUNDING, Gap
from syncnorm.tools.compare.records import ArmResult, Comparison
from syncnorm.tools.report.figures import figure

# Marker, line style and colour: any one of them tells the arms apart.
_LOOKS = {
    "single": ("o", "-", "#000000"),
    "dp": ("v", (0, (1, 1)), "#777777"),
    "ddp": ("s", "--", "#d55e00"),
    "ddp+syncbn": ("D", "-", "#0072b2"),
    "ddp+group": ("^", "-.", "#009e73"),
    "ddp+layer": ("P", (0, (5, 1, 1, 1, 1, 1)), "#cc79a7"),
    "ddp+instance": ("X", ":", "#8c510a"),
    "ddp+torch-syncbn": ("*", (0, (8, 3)), "#56b4e9"),
}
_OTHER = ("o", "-", "#444444")
_WIDTH, _HEIGHT = 4.6, 3.1  # inches; a phone shows 4.6 at about full size
# Below what fp32 can tell there is nothing to see, and zero has no logarithm.
_FLOOR = 1e-9


class Picture(NamedTuple):
    """An SVG, and what it says to those who cannot see it, or want to know what they see."""

    title: str
    svg: str
    caption: str


def pictures(comparison: Comparison) -> Iterator[Picture]:
    """Those of one comparison that its record has figures for."""
    for draw in (_results, _curves, _parity_over_depth, _parity_over_steps, _spread, _time):
        picture = draw(comparison)
        if picture is not None:
            yield picture


def over_batch(comparisons: Sequence[Comparison]) -> Picture | None:
    """What each arm ends with against the batch per rank; None for fewer than two batches."""
    sizes = sorted({c.settings.batch_per_rank for c in comparisons})
    if len(sizes) < 2:
        return None
    metric, scale, label = _metric(comparisons[0])

    def draw(ax: Any) -> None:
        for name in dict.fromkeys(arm.name for c in comparisons for arm in c.arms if _finished(arm, metric)):
            ours = [(c.settings.batch_per_rank, c[name]) for c in comparisons if name in {a.name for a in c.arms}]
            points = sorted((b, _values(arm, metric, scale)) for b, arm in ours if _finished(arm, metric))
            ax.errorbar(
                [b for b, _ in points],
                [fmean(v) for _, v in points],
                yerr=[stdev(v) if len(v) > 1 else 0 for _, v in points],
                capsize=2,
                **_look(name),
            )
        ax.set_xscale("log", base=2)
        ax.set_xticks(sizes, [str(b) for b in sizes])
        ax.minorticks_off()
        ax.set_xlabel("samples a rank")
        ax.set_ylabel(label)

    caption = (
        f"{label} after the last step, the same one for all, so that larger batches have seen more samples; "
        "bars are one standard deviation over the seeds."
    )
    return Picture(f"{label} against batch per rank", _svg(draw), caption)


def _results(comparison: Comparison) -> Picture | None:
    metric, scale, label = _metric(comparison)
    arms = [arm for arm in comparison.arms if _finished(arm, metric)]
    if not arms:
        return None

    def draw(ax: Any) -> None:
        for place, arm in enumerate(reversed(arms)):
            values, look = _values(arm, metric, scale), _LOOKS.get(arm.name, _OTHER)
            ax.plot(values, [place] * len(values), "|", color="#000000", markersize=9, markeredgewidth=1)
            ax.plot([fmean(values)], [place], look[0], color=look[2], markersize=8, markeredgecolor="#000000")
        ax.set_yticks(range(len(arms)), [arm.label for arm in reversed(arms)])
        ax.set_ylim(-0.6, len(arms) - 0.4)
        ax.set_xlabel(label)

    return Picture(f"{label} by arm", _svg(draw, legend=False), "A stroke a seed; the marker is their mean.")


def _curves(comparison: Comparison) -> Picture | None:
    metric, scale, label = _metric(comparison)
    arms = [arm for arm in comparison.arms if _finished(arm, metric)]
    if not arms:
        return None

    def draw(ax: Any) -> None:
        for arm in arms:
            runs = [run.test_accuracies if metric == "accuracy" else run.test_losses for run in arm.seeds]
            by_step: dict[int, list[float]] = {}
            for point in (p for run in runs for p in run if p.value is not None):
                by_step.setdefault(point.step, []).append((point.value or 0.0) * scale)
            ax.plot(list(by_step), [fmean(v) for v in by_step.values()], **_look(arm.name))
        ax.set_xlabel("step")
        ax.set_ylabel(label)

    return Picture("Learning curves", _svg(draw), f"{label}, mean over the seeds, while each arm trains.")


def _parity_over_depth(comparison: Comparison) -> Picture | None:
    arms = [a for a in comparison.arms if a.name != "single" and a.parity and any(p.layers for p in a.parity[:1])]
    if not arms:
        return None

    def draw(ax: Any) -> None:
        for arm in arms:
            places = [(i, _height(layer.output)) for i, layer in enumerate(arm.parity[0].layers, 1)]
            known = [(i, height) for i, height in places if height is not None]
            ax.plot([i for i, _ in known], [h for _, h in known], **_look(arm.name))
        _rounding_line(ax)
        ax.set_xlabel("norm layer, in the order of the forward")
        ax.set_ylabel("relative difference of its output")
        ax.xaxis.get_major_locator().set_params(integer=True)

    step = arms[0].parity[0].step
    caption = (
        f"max|a - b| / max|b| against one process with the whole batch, in step {step}. Below the line it is "
        "fp32 rounding: the arm computes the same."
    )
    return Picture("Difference to single over depth", _svg(draw), caption)


def _parity_over_steps(comparison: Comparison) -> Picture | None:
    arms = [arm for arm in comparison.arms if arm.name != "single" and arm.parity]
    if not arms:
        return None

    def draw(ax: Any) -> None:
        for arm in arms:
            points = [(p.step, _height(p.params)) for p in arm.parity]
            known = [(step, height) for step, height in points if height is not None]
            ax.plot([s for s, _ in known], [h for _, h in known], **_look(arm.name))
        _rounding_line(ax)
        ax.set_xlabel("step")
        ax.set_ylabel("relative difference of weights")
        ax.xaxis.get_major_locator().set_params(integer=True)

    caption = "The same for all weights, step after step. Rounding grows as training goes on; so judge by the first."
    return Picture("Difference to single over steps", _svg(draw), caption)


def _spread(comparison: Comparison) -> Picture | None:
    layers = [layer for layer in comparison.spread if layer.mean is not None]
    if not layers:
        return None
    names = [layer.layer for layer in comparison.spread]

    def draw(ax: Any) -> None:
        places = [names.index(layer.layer) for layer in layers]
        means, variances = [layer.mean for layer in layers], [layer.var or 0.0 for layer in layers]
        ax.barh([place - 0.2 for place in places], means, 0.38, label="means", **_bar("#0072b2", ""))
        ax.barh([place + 0.2 for place in places], variances, 0.38, label="variances", **_bar("#e8e8e8", "////"))
        ax.set_yticks(range(len(names)), names, fontsize=7 if len(names) < 25 else 4)
        ax.invert_yaxis()
        ax.set_xlabel("spread between ranks")

    caption = (
        "How far each rank's statistics lie from the whole batch's under plain DDP: means in standard deviations, "
        "variances relative. Near zero, syncing changes nothing; at 0.5 a typical rank shifts a typical channel by "
        "half a standard deviation."
    )
    height = max(_HEIGHT, 0.19 * len(names) + 0.9)
    return Picture("Spread of the statistics, layer by layer", _svg(draw, height=height), caption)


def _time(comparison: Comparison) -> Picture | None:
    arms = [arm for arm in comparison.arms if arm.step_seconds is not None]
    if not arms:
        return None

    def draw(ax: Any) -> None:
        labels, left = [arm.label for arm in arms], [0.0] * len(arms)
        for name, part, look in _PARTS:
            widths = [1e3 * part(arm) for arm in arms]
            if any(widths):
                ax.barh(labels, widths, 0.62, left=left, label=name, **_bar(*look))
            left = [a + b for a, b in zip(left, widths, strict=True)]
        ax.invert_yaxis()
        ax.set_xlabel("ms a step")

    caption = (
        "Where a step's time goes, mean over ranks. A rank waits in a norm layer's collective, or for DDP's; the "
        "rest is work, which with more ranks than cores includes standing in line for one."
    )
    return Picture("Time of a step", _svg(draw), caption)


def _share(arm: ArmResult, seconds: Callable[[Any], float]) -> float:
    """Of the median step, as much as of the steps in which the waiting was measured."""
    if arm.wait is None or not arm.wait.step_seconds:
        return 0.0
    return (arm.step_seconds or 0.0) * seconds(arm.wait) / arm.wait.step_seconds


def _norm_wait(arm: ArmResult) -> float:
    return _share(arm, lambda wait: wait.norm_seconds)


def _ddp_wait(arm: ArmResult) -> float:
    return _share(arm, lambda wait: wait.ddp_seconds)


_PARTS: tuple[tuple[str, Callable[[ArmResult], float], tuple[str, str]], ...] = (
    ("work", lambda arm: (arm.step_seconds or 0.0) - _norm_wait(arm) - _ddp_wait(arm), ("#b8b8b8", "")),
    ("waiting in norm layers", _norm_wait, ("#0072b2", "")),
    ("waiting in DDP", _ddp_wait, ("#ffffff", "////")),
)


def _metric(comparison: Comparison) -> tuple[str, float, str]:
    """Its name, what to multiply it with, and what to call it."""
    return ("accuracy", 100, "Test accuracy, %") if comparison.task.metric == "accuracy" else ("loss", 1, "Test loss")


def _finished(arm: ArmResult, metric: str) -> bool:
    return bool(arm.seeds) and all(value is not None for value in arm.results(metric))


def _values(arm: ArmResult, metric: str, scale: float) -> list[float]:
    return [value * scale for value in arm.results(metric) if value is not None]


def _height(gap: Gap | None) -> float | None:
    return None if gap is None else max(gap.max_rel, _FLOOR)


def _rounding_line(ax: Any) -> None:
    ax.set_yscale("log")
    ax.axhline(ROUNDING, color="#000000", linewidth=0.8, linestyle=(0, (1, 2)))
    ax.text(0.99, ROUNDING * 1.3, "fp32 rounding", transform=ax.get_yaxis_transform(), ha="right", fontsize=7)


def _look(name: str) -> dict[str, Any]:
    marker, line, colour = _LOOKS.get(name, _OTHER)
    return {"label": name, "marker": marker, "linestyle": line, "color": colour, "markersize": 4.5, "linewidth": 1.4}


def _bar(colour: str, hatch: str) -> dict[str, Any]:
    return {"color": colour, "hatch": hatch, "edgecolor": "#000000", "linewidth": 0.6}


def _svg(draw: Callable[[Any], None], height: float = _HEIGHT, legend: bool = True) -> str:
    svg = BytesIO()
    look = {"font.size": 8.5, "hatch.linewidth": 0.6, "svg.fonttype": "path"}
    with figure(svg, (_WIDTH, height), look, "constrained", format="svg", metadata={"Date": None}) as drawn:
        ax = drawn.subplots()
        draw(ax)
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="both", color="#dddddd", linewidth=0.6)
        ax.set_axisbelow(True)
        handles, labels = ax.get_legend_handles_labels()
        if legend and handles:
            drawn.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=7.5)
    return svg.getvalue().decode()
