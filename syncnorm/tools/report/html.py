"""Comparisons as one page that stands alone: verdict, tables and pictures, without network and without scripts."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from syncnorm.tools.common.files import write_file
from syncnorm.tools.compare.evidence import Gap
from syncnorm.tools.compare.records import ArmResult, Comparison
from syncnorm.tools.report.compare_plots import Picture, over_batch, pictures


class _Table(NamedTuple):
    title: str
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    legend: str


def write_html(comparisons: Sequence[Comparison], path: Path) -> None:
    """Writes the report of comparisons that differ in their batch per rank, or of one, to ``path``.

    Raises:
        ValueError: no comparison.
    """
    if not comparisons:
        raise ValueError("a report needs at least one comparison")
    write_file(path, render_html(comparisons).encode(errors="replace"))  # the command may hold any bytes


def render_html(comparisons: Sequence[Comparison]) -> str:
    """The page. What users named (models, layers, commands) is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("syncnorm.tools.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["picture"] = _figure
    template = environment.get_template("comparison.html.j2")
    comparisons = sorted(comparisons, key=lambda c: c.settings.batch_per_rank)
    first = comparisons[0]
    task, settings = first.task, first.settings
    return template.render(
        title=f"Which norm for {task.model}?",
        subtitle=(
            f"{task.num_parameters:,} parameters, {len(task.norm_layers)} norm layers, learning {task.num_train:,} "
            f"samples of {task.data} in {settings.steps:,} steps on {settings.world_size} ranks, {_seeds(first)}."
        ),
        overview=over_batch(comparisons),
        parts=[_part(comparison) for comparison in comparisons],
        made=_made(comparisons),
    )


def _part(comparison: Comparison) -> dict[str, Any]:
    settings = comparison.settings
    return {
        "heading": (
            f"{settings.batch_per_rank} sample{'s' * (settings.batch_per_rank > 1)} a rank, "
            f"{settings.global_batch} in all"
        ),
        "verdict": comparison.verdict or ("No verdict: none of the arms that it rests on was run.",),
        "tables": [_result_table(comparison), _parity_table(comparison)],
        "pictures": list(pictures(comparison)),
        "not_run": [f"Not run: {arm.label}: {arm.not_run}" for arm in comparison.arms if arm.not_run],
    }


def _result_table(comparison: Comparison) -> _Table:
    accuracy = comparison.task.metric == "accuracy"
    rows = []
    for arm in (each for each in comparison.arms if not each.not_run):
        value = arm.test_accuracy if accuracy else arm.test_loss
        deviation = arm.spread_over_seeds(comparison.task.metric)
        scale = 100 if accuracy else 1
        rows.append(
            (
                arm.label,
                _number(value, scale, ".1f" if accuracy else ".4f"),
                _number(deviation, scale, ".1f" if accuracy else ".4f"),
                _number(arm.samples_per_second, 1, ",.0f"),
                _number(arm.step_seconds, 1e3, ".1f"),
                _number(arm.wait.norm_seconds if arm.wait else None, 1e3, ".1f"),
                _number(arm.wait.ddp_seconds if arm.wait else None, 1e3, ".1f"),
                f"{arm.calls('ddp')} + {arm.calls('norm')}" if arm.collectives else "0",
                _number(arm.payload_bytes / 1024, 1, ",.0f"),
                _number(arm.memory.peak_bytes if arm.memory else None, 2**-20, ",.0f"),
            )
        )
    head = (
        "arm",
        "test accuracy, %" if accuracy else "test loss",
        "± over seeds",
        "samples a second",
        "ms a step",
        "waiting in norms, ms",
        "waiting in DDP, ms",
        "collectives a step, DDP + norm",
        "KiB a step",
        f"peak memory, MiB ({_memory(comparison)})",
    )
    legend = (
        f"On {comparison.task.num_test:,} samples that no arm trained on. single and dp are one process, the others "
        "all ranks. Collectives and KiB: rank 0's calls in one step and the tensors that it hands in."
    )
    return _Table("Result and cost", head, rows, legend)


def _parity_table(comparison: Comparison) -> _Table:
    rows: list[tuple[str, ...]] = []
    for arm in comparison.arms:
        if arm.name == "single" or not arm.parity:
            continue
        first = arm.parity[0]
        gaps = (first.output, first.gradients, first.params, first.running_mean, first.running_var)
        rows.append((arm.label, *(_gap(gap) for gap in gaps), _says(arm)))
    head = ("arm", "outputs of the norms", "gradients", "weights", "running means", "running variances", "says")
    legend = (
        "max|a - b| / max|b| over everything of its kind. Weights and batches are the same in all arms, so one that "
        "trains like one process differs by fp32 rounding alone, about 1e-7."
    )
    return _Table("Difference to one process with the whole batch, after step 1", head, rows, legend)


def _says(arm: ArmResult) -> str:
    first = arm.parity[0]
    if first.within_rounding:
        said = "the same to rounding"
    elif first.running_mean is None:
        said = "another norm"
    else:
        said = "other statistics" + (f", from {first.departs_at} on" if first.departs_at else "")
    return f"{said}. {first.note}" if first.note else said


def _made(comparisons: Sequence[Comparison]) -> list[str]:
    first = comparisons[0]
    hardware, settings = first.hardware, first.settings
    return [
        *dict.fromkeys(f"Command: {c.command}" for c in comparisons),
        f"{first.date}, {sum(c.wall_seconds for c in comparisons):.0f} s.",
        f"{hardware.device_name}, {hardware.cpu_count} cores, {hardware.threads_per_rank} thread(s) a rank, "
        f"{hardware.backend}.",
        f"torch {first.torch_version}, syncnorm {first.syncnorm_version}, Python {first.python_version}.",
        f"SGD, learning rate {settings.lr:g} along a cosine, momentum {settings.momentum:g}, {first.task.loss}; the "
        "same weights and the same batches in the same order for every arm of a seed.",
    ]


def _figure(picture: Picture) -> Any:
    from markupsafe import Markup

    # An image of its own: ids of one drawing would meet those of the next.
    data = b64encode(picture.svg.encode()).decode()
    return Markup(
        '<figure><h3>{}</h3><img alt="{}" src="data:image/svg+xml;base64,{}"><figcaption>{}</figcaption></figure>'
    ).format(picture.title, picture.title, data, picture.caption)


def _seeds(comparison: Comparison) -> str:
    count = len(comparison.settings.seeds)
    return f"{count} seed{'s' * (count > 1)}"


def _memory(comparison: Comparison) -> str:
    measures = {arm.memory.measure for arm in comparison.arms if arm.memory is not None}
    return ", ".join(sorted(measures)) or "not measured"


def _number(value: float | None, scale: float, spec: str) -> str:
    return "-" if value is None else format(value * scale, spec)


def _gap(gap: Gap | None) -> str:
    if gap is None:
        return "-"
    return "0" if gap.max_rel == 0 else f"{gap.max_rel:.0e}"
