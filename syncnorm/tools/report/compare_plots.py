"""The plots of a comparison's report, each an SVG that is legible on a phone and in black and white."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from io import BytesIO
from statistics import fmean, stdev
from typing import Any, NamedTuple

from syncnorm.tools.compare.records import ROUNDING, ArmResult, Comparison, MaxError, StepTime
from syncnorm.tools.report.figures import figure

# Marker, line style and color: each of them distinguishes the arms.
_STYLES = {
    "single": ("o", "-", "#000000"),
    "dp": ("v", (0, (1, 1)), "#777777"),
    "ddp": ("s", "--", "#d55e00"),
    "ddp+syncbn": ("D", "-", "#0072b2"),
    "ddp+group": ("^", "-.", "#009e73"),
    "ddp+layer": ("P", (0, (5, 1, 1, 1, 1, 1)), "#cc79a7"),
    "ddp+instance": ("X", ":", "#8c510a"),
    "ddp+torch-syncbn": ("*", (0, (8, 3)), "#56b4e9"),
}
_OTHER_STYLE = ("o", "-", "#444444")
# A phone shows 4.6 inches at about full size.
_WIDTH_INCHES, _HEIGHT_INCHES = 4.6, 3.1
# Smaller errors are drawn here: fp32 does not resolve them, and zero has no logarithm.
_MIN_ERROR = 1e-9


class Plot(NamedTuple):
    """An SVG with its title and a caption that explains it."""

    title: str
    svg: str
    caption: str


def plots(comparison: Comparison) -> Iterator[Plot]:
    """The plots of one comparison for which its record has data."""
    for draw in (_results, _curves, _parity_by_depth, _parity_by_step, _divergence, _step_time):
        plot = draw(comparison)
        if plot is not None:
            yield plot


def plot_against_batch(comparisons: Sequence[Comparison]) -> Plot | None:
    """The final result of each arm against the batch per rank; None for fewer than two batches."""
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
                **_line_style(name),
            )
        ax.set_xscale("log", base=2)
        ax.set_xticks(sizes, [str(b) for b in sizes])
        ax.minorticks_off()
        ax.set_xlabel("samples per rank")
        ax.set_ylabel(label)

    caption = (
        f"{label} after the last step. The number of steps is the same for all, so larger batches have seen more "
        "samples. Error bars are one standard deviation over the seeds."
    )
    return Plot(f"{label} against batch per rank", _svg(draw), caption)


def _results(comparison: Comparison) -> Plot | None:
    metric, scale, label = _metric(comparison)
    arms = [arm for arm in comparison.arms if _finished(arm, metric)]
    if not arms:
        return None

    def draw(ax: Any) -> None:
        for place, arm in enumerate(reversed(arms)):
            values = _values(arm, metric, scale)
            marker, _, color = _STYLES.get(arm.name, _OTHER_STYLE)
            ax.plot(values, [place] * len(values), "|", color="#000000", markersize=9, markeredgewidth=1)
            ax.plot([fmean(values)], [place], marker, color=color, markersize=8, markeredgecolor="#000000")
        ax.set_yticks(range(len(arms)), [arm.label for arm in reversed(arms)])
        ax.set_ylim(-0.6, len(arms) - 0.4)
        ax.set_xlabel(label)

    return Plot(f"{label} by arm", _svg(draw, legend=False), "One stroke per seed; the marker is their mean.")


def _curves(comparison: Comparison) -> Plot | None:
    metric, scale, label = _metric(comparison)
    arms = [arm for arm in comparison.arms if _finished(arm, metric)]
    if not arms:
        return None

    def draw(ax: Any) -> None:
        for arm in arms:
            runs = [run.test_metrics for run in arm.seeds]
            by_step: dict[int, list[float]] = {}
            for point in (p for run in runs for p in run if p.value is not None):
                by_step.setdefault(point.step, []).append((point.value or 0.0) * scale)
            ax.plot(list(by_step), [fmean(v) for v in by_step.values()], **_line_style(arm.name))
        ax.set_xlabel("step")
        ax.set_ylabel(label)

    return Plot("Learning curves", _svg(draw), f"{label} during training, mean over the seeds.")


def _parity_by_depth(comparison: Comparison) -> Plot | None:
    arms = [a for a in comparison.arms if a.name != "single" and a.parity and any(p.layers for p in a.parity[:1])]
    if not arms:
        return None

    def draw(ax: Any) -> None:
        for arm in arms:
            errors = [(i, _relative(layer.output)) for i, layer in enumerate(arm.parity[0].layers, 1)]
            known = [(i, error) for i, error in errors if error is not None]
            ax.plot([i for i, _ in known], [error for _, error in known], **_line_style(arm.name))
        _rounding_line(ax)
        ax.set_xlabel("norm layer, in the order of the forward")
        ax.set_ylabel("relative difference of the output")
        ax.xaxis.get_major_locator().set_params(integer=True)

    step = arms[0].parity[0].step
    caption = (
        f"max|a - b| / max|b|, compared with one process that has the global batch, in step {step}. Values below the "
        "line are fp32 rounding: the arm is equivalent."
    )
    return Plot("Difference from single by depth", _svg(draw), caption)


def _parity_by_step(comparison: Comparison) -> Plot | None:
    arms = [arm for arm in comparison.arms if arm.name != "single" and arm.parity]
    if not arms:
        return None

    def draw(ax: Any) -> None:
        for arm in arms:
            errors = [(p.step, _relative(p.params)) for p in arm.parity]
            known = [(step, error) for step, error in errors if error is not None]
            ax.plot([step for step, _ in known], [error for _, error in known], **_line_style(arm.name))
        _rounding_line(ax)
        ax.set_xlabel("step")
        ax.set_ylabel("relative difference of the weights")
        ax.xaxis.get_major_locator().set_params(integer=True)

    caption = (
        "The same for all weights at several steps. Rounding errors grow during training; judge by the first step."
    )
    return Plot("Difference from single by step", _svg(draw), caption)


def _divergence(comparison: Comparison) -> Plot | None:
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
        ax.set_xlabel("divergence between ranks")

    caption = (
        "Root mean square difference between each rank's statistics and those of the global batch under plain DDP: "
        "means in standard deviations, variances relative. Near zero, SyncBN has no effect; at 0.5, a typical rank "
        "shifts a typical channel by half a standard deviation."
    )
    height = max(_HEIGHT_INCHES, 0.19 * len(names) + 0.9)
    return Plot("Divergence of the statistics by layer", _svg(draw, height=height), caption)


def _step_time(comparison: Comparison) -> Plot | None:
    arms = [arm for arm in comparison.arms if arm.step is not None]
    if not arms:
        return None

    def draw(ax: Any) -> None:
        labels, left = [arm.label for arm in arms], [0.0] * len(arms)
        for name, part, style in _PARTS:
            widths = [1e3 * part(arm.step) for arm in arms if arm.step]
            if any(widths):
                ax.barh(labels, widths, 0.62, left=left, label=name, **_bar(*style))
            left = [a + b for a, b in zip(left, widths, strict=True)]
        ax.invert_yaxis()
        ax.set_xlabel("ms per step")

    caption = (
        "Time of a training step, mean over ranks: waiting in the collectives of norm layers, waiting in those of "
        "DDP, and work, which includes waiting for a core if there are more ranks than cores."
    )
    return Plot("Step time", _svg(draw), caption)


_PARTS: tuple[tuple[str, Callable[[StepTime], float], tuple[str, str]], ...] = (
    ("work", lambda step: step.work_seconds, ("#b8b8b8", "")),
    ("waiting in norm layers", lambda step: step.norm_seconds or 0.0, ("#0072b2", "")),
    ("waiting in DDP", lambda step: step.ddp_seconds or 0.0, ("#ffffff", "////")),
)


def _metric(comparison: Comparison) -> tuple[str, float, str]:
    """The name of the metric, the factor that converts it to the unit shown, and the label."""
    return ("accuracy", 100, "Test accuracy, %") if comparison.task.metric.share else ("loss", 1, "Test loss")


def _finished(arm: ArmResult, metric: str) -> bool:
    return bool(arm.seeds) and all(value is not None for value in arm.results)


def _values(arm: ArmResult, metric: str, scale: float) -> list[float]:
    return [value * scale for value in arm.results if value is not None]


def _relative(error: MaxError | None) -> float | None:
    return None if error is None else max(error.max_rel, _MIN_ERROR)


def _rounding_line(ax: Any) -> None:
    ax.set_yscale("log")
    ax.axhline(ROUNDING, color="#000000", linewidth=0.8, linestyle=(0, (1, 2)))
    ax.text(0.99, ROUNDING * 1.3, "fp32 rounding", transform=ax.get_yaxis_transform(), ha="right", fontsize=7)


def _line_style(name: str) -> dict[str, Any]:
    marker, line, color = _STYLES.get(name, _OTHER_STYLE)
    return {"label": name, "marker": marker, "linestyle": line, "color": color, "markersize": 4.5, "linewidth": 1.4}


def _bar(color: str, hatch: str) -> dict[str, Any]:
    return {"color": color, "hatch": hatch, "edgecolor": "#000000", "linewidth": 0.6}


def _svg(draw: Callable[[Any], None], height: float = _HEIGHT_INCHES, legend: bool = True) -> str:
    svg = BytesIO()
    style = {"font.size": 8.5, "hatch.linewidth": 0.6, "svg.fonttype": "path"}
    with figure(svg, (_WIDTH_INCHES, height), style, "constrained", format="svg", metadata={"Date": None}) as drawn:
        ax = drawn.subplots()
        draw(ax)
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="both", color="#dddddd", linewidth=0.6)
        ax.set_axisbelow(True)
        handles, labels = ax.get_legend_handles_labels()
        if legend and handles:
            drawn.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=7.5)
    return svg.getvalue().decode()
