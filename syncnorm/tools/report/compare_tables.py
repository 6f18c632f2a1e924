"""The tables of a comparison's page: texts, and for each number the value by which a table is sorted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from syncnorm.tools.compare.records import ArmResult, Comparison, Decision, LayerDivergence, MaxError, StepRatio
from syncnorm.tools.report.arm_styles import metric_label, shown_text


class Cell(NamedTuple):
    """A text; ``key`` is the number that it shows, if it shows one."""

    text: str
    key: float | None = None


class Table(NamedTuple):
    """A table; the first cell of a row is its name."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    legend: str

    @property
    def text_columns(self) -> list[bool]:
        """For each column whether it has texts, which are aligned to the left, rather than numbers."""
        columns = zip(*self.rows, strict=True)
        return [any(cell.key is None and cell.text != "-" for cell in column) for column in columns]


def tables(comparison: Comparison) -> list[Table]:
    """Those for which the record has data: decisions, results and cost, parity by arm, and by layer."""
    found = (_decisions(comparison), _results(comparison), _parity(comparison), _layers(comparison))
    return [table for table in found if table.rows]


def _decisions(comparison: Comparison) -> Table:
    unit = "points" if comparison.task.metric.share else comparison.task.metric.name
    spec = "+.2f" if comparison.task.metric.share else "+.3g"
    rows = [
        (
            Cell(each.arm),
            Cell(each.other),
            Cell(each.kind),
            _number(each.difference, spec),
            Cell(_interval(each, spec)),
        )
        for each in comparison.decisions
    ]
    head = ("arm", "compared with", "decision", f"difference, {unit}", "confidence interval")
    margins = sorted({f"{each.margin:.3g}" for each in comparison.decisions}, key=float)
    confidence = max((each.confidence for each in comparison.decisions), default=0.0)
    legend = (
        f"A positive difference: the arm is better. The intervals have {100 * confidence:.4g}% confidence, over "
        f"seeds and test samples. Differences within the margin do not matter; it is {' or '.join(margins)} {unit}."
    )
    return Table("Decisions", head, rows, legend)


def _interval(decision: Decision, spec: str) -> str:
    if decision.low is None or decision.high is None:
        return "one seed has none"
    return f"{decision.low:{spec}} to {decision.high:{spec}}"


def _results(comparison: Comparison) -> Table:
    metric = comparison.task.metric
    rows = [_result_row(comparison, arm) for arm in comparison.arms if not arm.not_run]
    measures = sorted({arm.memory.measure for arm in comparison.arms if arm.memory is not None})
    head = (
        "arm",
        metric_label(metric).lower(),
        "standard deviation over seeds",
        "samples per second",
        "ms per step",
        "of which work",
        "waiting in norm layers",
        "waiting in DDP",
        "time relative to ddp",
        "collectives per step, DDP + norm",
        "KiB per step",
        f"peak memory, MiB ({', '.join(measures) or 'not measured'})",
    )
    legend = (
        f"On {comparison.task.num_test:,} samples that were not used for training. single and dp use one "
        "process, the other arms use all ranks. Times relative to ddp: the arms took turns; median and 95% interval. "
        "Collectives and KiB: rank 0's calls in one step, and the size of the tensors that it passes in."
    )
    return Table("Result and cost", head, rows, legend)


def _result_row(comparison: Comparison, arm: ArmResult) -> tuple[Cell, ...]:
    metric, step = comparison.task.metric, arm.step
    return (
        Cell(arm.label),
        Cell("-") if arm.test_metric is None else Cell(shown_text(arm.test_metric, metric), arm.test_metric),
        Cell("-") if arm.std is None else Cell(shown_text(arm.std, metric), arm.std),
        _number(comparison.samples_per_second(arm), ",.0f"),
        _milliseconds(step.seconds if step else None),
        _milliseconds(step.work_seconds if step else None),
        _milliseconds(step.norm_seconds if step else None),
        _milliseconds(step.ddp_seconds if step else None),
        _cost(arm.cost),
        Cell(f"{arm.calls('ddp')} + {arm.calls('norm')}", arm.calls("ddp") + arm.calls("norm")),
        _number(arm.payload_bytes / 1024, ",.0f"),
        _number(arm.memory.peak_bytes / 2**20 if arm.memory else None, ",.0f"),
    )


def _milliseconds(seconds: float | None) -> Cell:
    return Cell("-") if seconds is None else Cell(f"{1e3 * seconds:.1f}", seconds)


def _cost(cost: StepRatio | None) -> Cell:
    return Cell("-") if cost is None else Cell(f"{cost.ratio:.2f} ({cost.low:.2f} to {cost.high:.2f})", cost.ratio)


def _parity(comparison: Comparison) -> Table:
    rows = []
    for arm in comparison.arms:
        if arm.name == "single" or not arm.parity:
            continue
        first = arm.parity[0]
        errors = (first.output, first.gradients, first.params, first.running_mean, first.running_var)
        rows.append((Cell(arm.label), *map(_error, errors), Cell(_conclusion(arm))))
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
    return Table("Difference from one process with the global batch, after step 1", head, rows, legend)


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


def _layers(comparison: Comparison) -> Table:
    arms = [arm for arm in comparison.arms if arm.name != "single" and arm.parity and arm.parity[0].layers]
    errors = [{layer.layer: layer.output for layer in arm.parity[0].layers} for arm in arms]
    divergence = {layer.layer: layer for layer in comparison.spread}
    rows = []
    for number, name in enumerate(comparison.task.norm_layers, 1):
        found = divergence.get(name, LayerDivergence(name, None, None))
        outputs = [_error(by_layer.get(name)) for by_layer in errors]
        rows.append(
            (Cell(name), Cell(str(number), number), *outputs, _number(found.mean, ".3f"), _number(found.var, ".3f"))
        )
    head = ("norm layer", "number", *(f"output, {arm.label}" for arm in arms), "divergence, mean", "divergence, var")
    legend = (
        "Outputs: the relative difference from one process, in step 1, for rank 0's part of the batch. Divergence: "
        "how much the statistics of the ranks' batches differ from those of the global batch, in the ddp arm after "
        "the training."
    )
    return Table("Layer by layer", head, rows if arms or divergence else [], legend)


def _number(value: float | None, spec: str) -> Cell:
    return Cell("-") if value is None else Cell(format(value, spec), value)


def _error(error: MaxError | None) -> Cell:
    if error is None:
        return Cell("-")
    return Cell("0" if error.max_rel == 0 else f"{error.max_rel:.0e}", error.max_rel)
