"""The plots of a comparison's report, each legible on a phone, in black and white, and on a dark screen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import nan
from statistics import fmean, stdev
from typing import Any

from syncnorm.tools.compare.records import (
    ROUNDING,
    ArmResult,
    Comparison,
    LayerDivergence,
    MaxError,
    StepTime,
)
from syncnorm.tools.report.arm_styles import arm_styles, finished, line_look, metric_label, shown, shown_text
from syncnorm.tools.report.decisions_plot import plot_decisions
from syncnorm.tools.report.figures import log_scale
from syncnorm.tools.report.inline_svg import (
    BAR,
    BLUE,
    HEIGHT,
    INK,
    ORANGE,
    PAPER,
    Plot,
    inline_svg,
    short_name,
)

# Smaller errors are drawn here: fp32 does not resolve them, and zero has no logarithm.
_MIN_ERROR = 1e-9


def plots(comparison: Comparison) -> Iterator[Plot]:
    """The plots of one comparison for which its record has data."""
    for draw in (plot_decisions, _results, _curves, _parity_by_depth, _parity_by_step, _divergence, _step_time):
        plot = draw(comparison)
        if plot is not None:
            yield plot


def plot_against_batch(comparisons: Sequence[Comparison]) -> Plot | None:
    """The final result of each arm against the batch per rank; None for fewer than two batches."""
    sizes = sorted({c.settings.batch_per_rank for c in comparisons})
    if len(sizes) < 2:
        return None
    metric = comparisons[0].task.metric
    label = metric_label(metric)
    runs = [(c.settings.batch_per_rank, arm) for c in comparisons for arm in c.arms if finished(arm)]
    lines = {
        name: sorted(
            (size, [shown(v, metric) for v in arm.results if v is not None]) for size, arm in runs if arm.name == name
        )
        for name in dict.fromkeys(arm.name for _, arm in runs)
    }
    styles = arm_styles(lines)

    def draw(ax: Any) -> None:
        for name, points in lines.items():
            spread = [stdev(values) if len(values) > 1 else 0 for _, values in points]
            ax.errorbar(
                [size for size, _ in points],
                [fmean(values) for _, values in points],
                yerr=spread,
                capsize=2,
                **line_look(name, styles[name]),
            )
        log_scale(ax.xaxis, base=2)
        ax.set_xticks(sizes, [str(size) for size in sizes])
        ax.minorticks_off()
        ax.set_xlabel("samples per rank")
        ax.set_ylabel(label)

    caption = (
        f"{label} after the last step. The number of steps is the same for all, so larger batches have seen more "
        "samples. Error bars are one standard deviation over the seeds."
    )
    by_arm = (
        f"{name} {_listed([(f'at {s}', _text(fmean(v))) for s, v in points])}" for name, points in lines.items()
    )
    return Plot(f"{label} against batch per rank", inline_svg(draw), caption, "; ".join(by_arm))


def _results(comparison: Comparison) -> Plot | None:
    arms = [arm for arm in comparison.arms if finished(arm)]
    if not arms:
        return None
    metric = comparison.task.metric
    label, styles = metric_label(metric), arm_styles(arm.name for arm in comparison.arms)

    def draw(ax: Any) -> None:
        for place, arm in enumerate(reversed(arms)):
            values = [shown(value, metric) for value in arm.results if value is not None]
            marker, _, color = styles[arm.name]
            ax.plot(values, [place] * len(values), "|", color=INK, markersize=9, markeredgewidth=1)
            ax.plot([fmean(values)], [place], marker, color=color, markersize=8, markeredgecolor=INK)
        ax.set_yticks(range(len(arms)), [short_name(arm.label) for arm in reversed(arms)])
        ax.set_ylim(-0.6, len(arms) - 0.4)
        ax.set_xlabel(label)

    caption = "One stroke per seed; the marker is their mean."
    svg = inline_svg(draw, _height(len(arms)), legend=False)
    return Plot(f"{label} by arm", svg, caption, _means(arms, comparison))


def _height(rows: int) -> float:
    """Of a plot with a row per arm, in inches."""
    return max(HEIGHT * 0.8, 0.26 * rows + 0.7)


def _means(arms: Sequence[ArmResult], comparison: Comparison) -> str:
    metric = comparison.task.metric
    return _listed([(arm.label, shown_text(arm.test_metric, metric)) for arm in arms if arm.test_metric is not None])


def _curves(comparison: Comparison) -> Plot | None:
    arms = [arm for arm in comparison.arms if finished(arm) and any(run.test_metrics for run in arm.seeds)]
    if not arms:
        return None
    metric = comparison.task.metric
    label, styles = metric_label(metric), arm_styles(arm.name for arm in comparison.arms)

    def draw(ax: Any) -> None:
        for arm in arms:
            by_step: dict[int, list[float]] = {}
            for point in (point for run in arm.seeds for point in run.test_metrics):
                if point.value is not None:
                    by_step.setdefault(point.step, []).append(shown(point.value, metric))
            steps, means = list(by_step), [fmean(values) for values in by_step.values()]
            spread = [stdev(values) if len(values) > 1 else 0.0 for values in by_step.values()]
            if any(spread):
                below, above = ([m + sign * s for m, s in zip(means, spread, strict=True)] for sign in (-1, 1))
                ax.fill_between(steps, below, above, color=styles[arm.name][2], alpha=0.16, linewidth=0)
            ax.plot(steps, means, **line_look(arm.name, styles[arm.name]))
        ax.set_xlabel("step")
        ax.set_ylabel(label)

    band = ", with a band of one standard deviation" if len(comparison.settings.seeds) > 1 else ""
    caption = f"{label} during training, mean over the seeds{band}."
    shows = f"after step {comparison.settings.steps:,}: {_means(arms, comparison)}"
    return Plot("Learning curves", inline_svg(draw), caption, shows)


def _parity_by_depth(comparison: Comparison) -> Plot | None:
    arms = [a for a in comparison.arms if a.name != "single" and a.parity and any(p.layers for p in a.parity[:1])]
    if not arms:
        return None
    styles = arm_styles(arm.name for arm in comparison.arms)
    errors = {
        arm.name: [(i, _relative(layer.output)) for i, layer in enumerate(arm.parity[0].layers, 1) if layer.output]
        for arm in arms
    }

    def draw(ax: Any) -> None:
        for name, points in errors.items():
            look = line_look(name, styles[name], len(points))
            ax.plot([i for i, _ in points], [error for _, error in points], **look)
        _rounding_line(ax)
        ax.set_xlabel("norm layer, in the order of the forward")
        ax.set_ylabel("relative difference of the output")
        ax.xaxis.get_major_locator().set_params(integer=True)

    step = arms[0].parity[0].step
    caption = (
        f"max|a - b| / max|b|, compared with one process that has the global batch, in step {step}. Values below the "
        "line are fp32 rounding: the arm is equivalent."
    )
    largest = [(name, f"{max(error for _, error in points):.0e}") for name, points in errors.items() if points]
    return Plot("Difference from single by depth", inline_svg(draw), caption, f"largest: {_listed(largest)}")


def _parity_by_step(comparison: Comparison) -> Plot | None:
    arms = [arm for arm in comparison.arms if arm.name != "single" and any(each.params for each in arm.parity)]
    if not arms:
        return None
    styles = arm_styles(arm.name for arm in comparison.arms)
    errors = {arm.name: [(each.step, _relative(each.params)) for each in arm.parity if each.params] for arm in arms}

    def draw(ax: Any) -> None:
        for name, points in errors.items():
            ax.plot([step for step, _ in points], [error for _, error in points], **line_look(name, styles[name]))
        _rounding_line(ax)
        ax.set_xlabel("step")
        ax.set_ylabel("relative difference of the weights")
        ax.xaxis.get_major_locator().set_params(integer=True)

    caption = (
        "The same for all weights at several steps. Rounding errors grow during training; judge by the first step."
    )
    first = _listed([(name, f"{points[0][1]:.0e}") for name, points in errors.items()])
    return Plot("Difference from single by step", inline_svg(draw), caption, f"after step 1: {first}")


def _divergence(comparison: Comparison) -> Plot | None:
    layers = [(i, layer) for i, layer in enumerate(comparison.spread, 1) if layer.mean is not None]
    if not layers:
        return None

    def draw(ax: Any) -> None:
        places = [i for i, _ in layers]
        means, variances = (
            [layer.mean for _, layer in layers],
            [nan if layer.var is None else layer.var for _, layer in layers],
        )
        ax.plot(places, means, **line_look("means", ("o", "-", BLUE), len(layers)))
        ax.plot(places, variances, **line_look("variances", ("s", "--", ORANGE), len(layers)))
        ax.set_ylim(bottom=0)
        ax.set_xlabel("norm layer, in the order of the forward")
        ax.set_ylabel("divergence between ranks")
        ax.xaxis.get_major_locator().set_params(integer=True)

    caption = (
        "Root mean square difference between each rank's statistics and those of the global batch under plain DDP: "
        "means in standard deviations, variances relative. Near zero, SyncBN has no effect; at 0.5, a typical rank "
        "shifts a typical channel by half a standard deviation."
    )
    largest = max((layer for _, layer in layers), key=_mean_divergence)
    shows = f"largest for the means: {_mean_divergence(largest):.3f} in layer {largest.layer}"
    return Plot("Divergence of the statistics by layer", inline_svg(draw), caption, shows)


def _mean_divergence(layer: LayerDivergence) -> float:
    return layer.mean or 0.0


def _step_time(comparison: Comparison) -> Plot | None:
    timed = [(arm, arm.step) for arm in comparison.arms if arm.step is not None]
    if not timed:
        return None

    def draw(ax: Any) -> None:
        places, left = range(len(timed)), [0.0] * len(timed)
        for name, part, (color, hatch) in _PARTS:
            widths = [1e3 * part(step) for _, step in timed]
            if any(widths):
                look = {"color": color, "hatch": hatch, "edgecolor": INK, "linewidth": 0.6}
                ax.barh(places, widths, 0.62, left=left, label=name, **look)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        ax.set_yticks(places, [short_name(arm.label) for arm, _ in timed])
        ax.invert_yaxis()
        ax.set_xlabel("ms per step")

    caption = (
        "Time of a training step, mean over ranks: waiting in the collectives of norm layers, waiting in those of "
        "DDP, and work, which includes waiting for a core if there are more ranks than cores."
    )
    shows = _listed([(arm.label, f"{1e3 * step.seconds:.1f} ms") for arm, step in timed])
    return Plot("Step time", inline_svg(draw, _height(len(timed) + 2)), caption, shows)


_PARTS: tuple[tuple[str, Callable[[StepTime], float], tuple[str, str]], ...] = (
    ("work", lambda step: step.work_seconds, (BAR, "")),
    ("waiting in norm layers", lambda step: step.norm_seconds or 0.0, (BLUE, "")),
    ("waiting in DDP", lambda step: step.ddp_seconds or 0.0, (PAPER, "////")),
)


def _relative(error: MaxError) -> float:
    return max(error.max_rel, _MIN_ERROR)


def _rounding_line(ax: Any) -> None:
    log_scale(ax.yaxis)
    low, high = ax.get_ylim()
    ax.set_ylim(min(low, ROUNDING / 100), max(2 * high, ROUNDING * 100))  # markers need room
    ax.axhline(ROUNDING, color=INK, linewidth=0.8, linestyle=(0, (1, 2)))
    ax.text(0.99, ROUNDING * 1.3, "fp32 rounding", transform=ax.get_yaxis_transform(), ha="right", fontsize=7.5)


def _listed(pairs: Sequence[tuple[str, str]]) -> str:
    return ", ".join(f"{name} {value}" for name, value in pairs)


def _text(value: float) -> str:
    return f"{value:.4g}"
