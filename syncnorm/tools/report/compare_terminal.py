"""A comparison on a terminal: the verdict, then the tables that it is based on, with their legends."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from syncnorm.tools.compare.records import (
    ROUNDING,
    ArmResult,
    Comparison,
    LayerDivergence,
    LayerParity,
    MaxError,
    Parity,
)
from syncnorm.tools.report.consoles import PlainTable, for_tables

# Enough to see where a difference begins; the JSON file has all of them.
MAX_LAYERS = 10
# Columns. Of longer names the end is shown, in which layers differ.
NAME_WIDTH = 32


def print_comparison(comparison: Comparison, console: Console | None = None) -> None:
    """Prints verdict, tables and legends, 80 to 100 columns wide; plain text if stdout is not a terminal."""
    (console or for_tables()).print(render(comparison))


def render(comparison: Comparison) -> RenderableType:
    """The verdict, the tables and their legends, for any rich console."""
    return Group(
        *_verdict(comparison),
        _headline(comparison),
        Text(),
        *_parity_part(comparison),
        *_layer_part(comparison),
        _result_table(comparison),
        _result_legend(comparison),
        Text(),
        _cost_table(comparison),
        _cost_legend(comparison),
        *_not_run(comparison),
    )


def _headline(comparison: Comparison) -> Text:
    settings, hardware, task = comparison.settings, comparison.hardware, comparison.task
    seeds = ", ".join(map(str, settings.seeds))
    return Text(
        f"{task.model} ({task.num_parameters:,} parameters, {len(task.norm_layers)} norm layers), trained on "
        f"{task.num_train:,} samples of {task.data} for {settings.steps} steps:\n"
        f"{settings.world_size} ranks x {settings.batch_per_rank} samples = a global batch of "
        f"{settings.global_batch}, {task.loss}, seed{'s' * (len(settings.seeds) > 1)} {seeds}.\n"
        f"{hardware.device_name}, {hardware.cpu_count} cores, {hardware.threads_per_rank} thread(s) per rank, "
        f"{hardware.backend}, torch {comparison.torch_version}, syncnorm {comparison.syncnorm_version}.\n"
        f"{comparison.date}, {comparison.wall_seconds:.0f} s."
    )


def _verdict(comparison: Comparison) -> list[RenderableType]:
    """The decision in bold, and below it what it is based on."""
    decision, *reasons = comparison.verdict or ("No decision: the arms that it is based on did not run.",)
    return [Text(decision, style="bold"), *(Padding(Text(each), (0, 0, 0, 2)) for each in reasons), Text()]


def _parity_part(comparison: Comparison) -> Iterator[RenderableType]:
    last = comparison.settings.parity_steps
    columns = [(1, "output"), (1, "grads"), (1, "params"), (1, "stats")]
    columns += [(last, "output"), (last, "params")] if last > 1 else []
    table = PlainTable("Relative difference from single" + (f", in step 1 and in step {last}" if last > 1 else ""))
    table.add_column("arm", no_wrap=True)
    for index, (step, kind) in enumerate(columns):
        first = index == 0 or columns[index - 1][0] != step
        table.add_column(f"{f'step {step}' if first else ''}\n{kind}", justify="right", no_wrap=True)
    table.add_column("\nsame as single?", no_wrap=True)
    for arm in comparison.arms:
        if arm.not_run:
            continue
        by_step = {parity.step: parity for parity in arm.parity}
        cells = [_error_text(_errors(by_step.get(step)).get(kind)) for step, kind in columns]
        table.add_row(arm.label, *cells, _same_as_single(arm))
    yield table
    yield Text(_PARITY_LEGEND, style="dim")
    for arm in comparison.arms:
        if arm.parity and arm.parity[0].note:
            yield Text(f"{arm.label}: {arm.parity[0].note}.")
    yield Text()


def _errors(parity: Parity | None) -> dict[str, MaxError | None]:
    if parity is None:
        return {}
    stats = [error for error in (parity.running_mean, parity.running_var) if error]
    return {
        "output": parity.output,
        "grads": parity.gradients,
        "params": parity.params,
        "stats": max(stats, key=lambda error: error.max_rel, default=None),
    }


def _error_text(error: MaxError | None) -> Text:
    if error is None:
        return Text("-")
    if error.max_rel == 0:
        return Text("0")
    return Text(f"{error.max_rel:.0e}", style="green" if error.max_rel <= ROUNDING else "red")


def _same_as_single(arm: ArmResult) -> Text:
    if not arm.parity:
        return Text("-")
    first = arm.parity[0]
    if arm.name == "single":
        return Text("the reference")
    if first.within_rounding:
        return Text("yes (rounding)", style="bold green")
    if first.running_mean is None:
        return Text("no (other norm)")
    if first.first_divergent_layer is None:
        return Text("no (other grads)", style="bold red")
    return Text("no (other stats)", style="bold red")


_PARITY_LEGEND = (
    "max|a - b| / max|b| of the norm layers' outputs for rank 0's samples, of the gradients and values of all "
    "parameters, and of the running statistics (rank 0's, which DDP saves). All arms have the same weights and "
    "batches, and no dropout here, so an arm that is equivalent to one process differs by fp32 rounding, about 1e-7. "
    "Rounding errors grow with the steps; judge by the first. '-': the arm's norm has no running statistics."
)


def _layer_part(comparison: Comparison) -> list[RenderableType]:
    layers = comparison.task.norm_layers
    arms = {arm.name: arm.parity[0].layers for arm in comparison.arms if arm.parity and arm.name.startswith("ddp")}
    shown = {name: {each.layer: each for each in arms[name]} for name in ("ddp", "ddp+syncbn") if name in arms}
    divergence = {each.layer: each for each in comparison.spread}
    if not layers or not (shown or divergence):
        return []
    rows = _evenly_chosen(layers)
    some = f", {len(rows)} of {len(layers)} layers" if len(rows) < len(layers) else ""
    table = PlainTable(f"Layer by layer{some}")
    table.add_column("norm layer", no_wrap=True)
    for index, name in enumerate(shown):
        table.add_column(f"{'output in step 1' if index == 0 else ''}\n{name}", justify="right", no_wrap=True)
    for header in ("divergence\nmean", "\nvar") if divergence else ():
        table.add_column(header, justify="right", no_wrap=True)
    for layer in rows:
        found = divergence.get(layer, LayerDivergence(layer, None, None))
        table.add_row(
            layer if len(layer) <= NAME_WIDTH else "..." + layer[3 - NAME_WIDTH :],
            *(_error_text(_output(by_layer.get(layer))) for by_layer in shown.values()),
            *((_number(found.mean, ".3f"), _number(found.var, ".3f")) if divergence else ()),
        )
    return [table, *([Text(_DIVERGENCE_LEGEND, style="dim")] if divergence else []), Text()]


def _output(parity: LayerParity | None) -> MaxError | None:
    return parity.output if parity else None


def _evenly_chosen(layers: tuple[str, ...]) -> list[str]:
    """All layers; or `MAX_LAYERS` of them, from the first to the last."""
    if len(layers) <= MAX_LAYERS:
        return list(layers)
    return [layers[round(i * (len(layers) - 1) / (MAX_LAYERS - 1))] for i in range(MAX_LAYERS)]


_DIVERGENCE_LEGEND = (
    "Divergence: how much the statistics of the ranks' batches differ from those of the global batch in the ddp arm "
    "after the training, root mean square. mean: in standard deviations; var: relative. If the values are small, "
    "SyncBN has little effect."
)


def _result_table(comparison: Comparison) -> PlainTable:
    accuracy = comparison.task.metric.share
    ran = [arm for arm in comparison.arms if arm.seeds]
    steps = [point.step for point in (ran[0].seeds[0].test_metrics if ran else ())]
    table = PlainTable(f"Result: {comparison.task.metric.name} on the test data after a number of steps, and speed")
    table.add_column("arm", no_wrap=True)
    for step in steps:
        table.add_column(f"{step:,}", justify="right", no_wrap=True)
    for header in ("seed std", "samples/s", "wall s"):
        table.add_column(header, justify="right", no_wrap=True)
    for arm in comparison.arms:
        if arm.not_run:
            table.add_row(arm.label, *["-"] * len(steps), "not run", "-", "-")
            continue
        std = arm.std
        table.add_row(
            arm.label,
            *(_result(_mean_at(arm, accuracy, index), accuracy) for index in range(len(steps))),
            "-" if std is None else f"± {_result(std, accuracy)}",
            _number(comparison.samples_per_second(arm), ",.0f"),
            _number(arm.wall_seconds, ".1f"),
        )
    return table


def _mean_at(arm: ArmResult, accuracy: bool, index: int) -> float | None:
    points = [run.test_metrics[index] for run in arm.seeds]
    values = [point.value for point in points if point.value is not None]
    return sum(values) / len(values) if len(values) == len(points) else None


def _result(value: float | None, accuracy: bool) -> str:
    return _number(value, ".1%" if accuracy else ".3g")


def _result_legend(comparison: Comparison) -> Text:
    num_seeds = len(comparison.settings.seeds)
    mean = f"Mean and standard deviation over {num_seeds} seeds" if num_seeds > 1 else "One seed"
    return Text(
        f"{mean}, on {comparison.task.num_test:,} samples that were not used for training. Samples/s: without data "
        "loading; single and dp use one process, the other arms use all ranks.",
        style="dim",
    )


def _cost_table(comparison: Comparison) -> PlainTable:
    table = PlainTable("Cost of a training step")
    table.add_column("arm", no_wrap=True)
    for header in (
        "ms = work\n+ DDP + norms",
        "\ntimes ddp",
        "calls\nDDP + norms",
        "\nKiB",
        "peak\nMiB",
    ):
        table.add_column(header, justify="right", no_wrap=True)
    for arm in comparison.arms:
        if not arm.not_run:
            table.add_row(arm.label, *_cost_cells(arm))
    return table


def _cost_cells(arm: ArmResult) -> tuple[str, ...]:
    step, cost = arm.step, arm.cost
    whole = _number(step.seconds * 1e3 if step else None, ".1f")
    waits = (step.ddp_seconds, step.norm_seconds) if step and arm.ranks > 1 else ()
    known = [wait * 1e3 for wait in waits if wait is not None]
    parts = [step.work_seconds * 1e3, *known] if step and known else []
    return (
        f"{whole} = {' + '.join(f'{part:.1f}' for part in parts)}" if parts else whole,
        f"{cost.low:.2f}-{cost.high:.2f}" if cost else "-",
        f"{arm.calls('ddp')} + {arm.calls('norm')}" if arm.collectives else "0",
        _number(arm.payload_bytes / 1024, ",.1f") if arm.collectives else "0",
        _number(arm.memory.peak_bytes / 2**20 if arm.memory else None, ",.1f"),
    )


def _number(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


def _cost_legend(comparison: Comparison) -> Text:
    measures = {arm.memory.measure for arm in comparison.arms if arm.memory}
    what = {
        "rss growth": "growth of a process's resident memory",
        "cuda allocated": "torch.cuda.max_memory_allocated",
    }
    memory = f" Peak: {what[measures.pop()]} per rank during training, the largest." if measures else ""
    return Text(
        "The arms took turns. ms: a step = work + waiting in the collectives of DDP (from the last gradient to the "
        "end of the backward, and its broadcast of buffers) + in those of norm layers, means over ranks. Times ddp: "
        "95% interval of the ratio. Calls and KiB: rank 0's collectives, and the size of the tensors that it passes "
        f"in.{memory}",
        style="dim",
    )


def _not_run(comparison: Comparison) -> list[Text]:
    return [Text(f"Not run: {arm.label}: {arm.not_run}") for arm in comparison.arms if arm.not_run]
