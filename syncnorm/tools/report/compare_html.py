"""Comparisons as one self-contained HTML page: verdict, tables and plots, without scripts or network access."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from syncnorm.tools.common.files import write_file
from syncnorm.tools.compare.records import ArmResult, Comparison, MaxError
from syncnorm.tools.report.compare_plots import Plot, plot_against_batch, plots


class _Table(NamedTuple):
    title: str
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    legend: str


def write_html(comparisons: Sequence[Comparison], path: Path) -> None:
    """Writes the report of one comparison, or of several that differ only in their batch per rank, to ``path``.

    Raises:
        ValueError: no comparison.
    """
    if not comparisons:
        raise ValueError("a report needs at least one comparison, got none")
    write_file(path, render_html(comparisons).encode(errors="replace"))  # the command may contain any bytes


def render_html(comparisons: Sequence[Comparison]) -> str:
    """The page. Names from the user (of models, layers, commands) are escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("syncnorm.tools.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["figure"] = _figure
    template = environment.get_template("comparison.html.j2")
    comparisons = sorted(comparisons, key=lambda c: c.settings.batch_per_rank)
    first = comparisons[0]
    task, settings = first.task, first.settings
    return template.render(
        title=f"Which norm for {task.model}?",
        subtitle=(
            f"{task.num_parameters:,} parameters, {len(task.norm_layers)} norm layers, trained on {task.num_train:,} "
            f"samples of {task.data} for {settings.steps:,} steps on {settings.world_size} ranks, "
            f"{_count(len(settings.seeds), 'seed')}."
        ),
        overview=plot_against_batch(comparisons),
        parts=[_part(comparison) for comparison in comparisons],
        provenance=_provenance(comparisons),
    )


def _part(comparison: Comparison) -> dict[str, Any]:
    settings = comparison.settings
    return {
        "heading": f"{_count(settings.batch_per_rank, 'sample')} per rank, global batch {settings.global_batch}",
        "verdict": comparison.verdict or ("No verdict: the arms that it is based on did not run.",),
        "tables": [_result_table(comparison), _parity_table(comparison)],
        "plots": list(plots(comparison)),
        "not_run": [f"Not run: {arm.label}: {arm.not_run}" for arm in comparison.arms if arm.not_run],
    }


def _result_table(comparison: Comparison) -> _Table:
    accuracy = comparison.task.metric.share
    rows = []
    for arm in (each for each in comparison.arms if not each.not_run):
        value = arm.test_metric
        scale = 100 if accuracy else 1
        rows.append(
            (
                arm.label,
                _number(value, scale, ".1f" if accuracy else ".4f"),
                _number(arm.std, scale, ".1f" if accuracy else ".4f"),
                _number(comparison.samples_per_second(arm), 1, ",.0f"),
                _number(arm.step.seconds if arm.step else None, 1e3, ".1f"),
                _number(arm.step.norm_seconds if arm.step else None, 1e3, ".1f"),
                _number(arm.step.ddp_seconds if arm.step else None, 1e3, ".1f"),
                f"{arm.calls('ddp')} + {arm.calls('norm')}" if arm.collectives else "0",
                _number(arm.payload_bytes / 1024, 1, ",.0f"),
                _number(arm.memory.peak_bytes if arm.memory else None, 2**-20, ",.0f"),
            )
        )
    head = (
        "arm",
        "test accuracy, %" if accuracy else "test loss",
        "standard deviation over seeds",
        "samples per second",
        "ms per step",
        "waiting in norm layers, ms",
        "waiting in DDP, ms",
        "collectives per step, DDP + norm",
        "KiB per step",
        f"peak memory, MiB ({_memory(comparison)})",
    )
    legend = (
        f"On {comparison.task.num_test:,} samples that were not used for training. single and dp use one "
        "process, the other arms use all ranks. Collectives and KiB: rank 0's calls in one step, and the size of the "
        "tensors that it passes in."
    )
    return _Table("Result and cost", head, rows, legend)


def _parity_table(comparison: Comparison) -> _Table:
    rows: list[tuple[str, ...]] = []
    for arm in comparison.arms:
        if arm.name == "single" or not arm.parity:
            continue
        first = arm.parity[0]
        errors = (first.output, first.gradients, first.params, first.running_mean, first.running_var)
        rows.append((arm.label, *(_relative(error) for error in errors), _conclusion(arm)))
    head = (
        "arm",
        "outputs of norm layers",
        "gradients",
        "weights",
        "running means",
        "running variances",
        "conclusion",
    )
    legend = (
        "max|a - b| / max|b| over all tensors of a kind. Weights and batches are the same in all arms, so an arm "
        "that is equivalent to one process differs only by fp32 rounding, about 1e-7."
    )
    return _Table("Difference from one process with the global batch, after step 1", head, rows, legend)


def _conclusion(arm: ArmResult) -> str:
    first = arm.parity[0]
    if first.within_rounding:
        conclusion = "equal up to rounding"
    elif first.running_mean is None:
        conclusion = "a different norm"
    else:
        layer = first.first_divergent_layer
        conclusion = "different statistics" + (f", from layer {layer} on" if layer else "")
    return f"{conclusion}. {first.note}" if first.note else conclusion


def _provenance(comparisons: Sequence[Comparison]) -> list[str]:
    first = comparisons[0]
    hardware, settings = first.hardware, first.settings
    return [
        *dict.fromkeys(f"Command: {c.command}" for c in comparisons),
        f"{first.date}, {sum(c.wall_seconds for c in comparisons):.0f} s.",
        f"{hardware.device_name}, {hardware.cpu_count} cores, {hardware.threads_per_rank} thread(s) per rank, "
        f"{hardware.backend}.",
        f"torch {first.torch_version}, syncnorm {first.syncnorm_version}, Python {first.python_version}.",
        f"SGD, learning rate {settings.lr:g} with a cosine schedule, momentum {settings.momentum:g}, "
        f"{first.task.loss}; for each seed, all arms have the same initial weights and the same batches in the same "
        "order.",
    ]


def _figure(plot: Plot) -> Any:
    from markupsafe import Markup

    # A data URL rather than inline SVG, because the ids of several drawings would collide.
    data = b64encode(plot.svg.encode()).decode()
    return Markup(
        '<figure><h3>{}</h3><img alt="{}" src="data:image/svg+xml;base64,{}"><figcaption>{}</figcaption></figure>'
    ).format(plot.title, plot.title, data, plot.caption)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number > 1)}"


def _memory(comparison: Comparison) -> str:
    measures = {arm.memory.measure for arm in comparison.arms if arm.memory is not None}
    return ", ".join(sorted(measures)) or "not measured"


def _number(value: float | None, scale: float, spec: str) -> str:
    return "-" if value is None else format(value * scale, spec)


def _relative(error: MaxError | None) -> str:
    if error is None:
        return "-"
    return "0" if error.max_rel == 0 else f"{error.max_rel:.0e}"
