"""A comparison on a terminal: the verdict, then what it rests on, and how to read that."""

from __future__ import annotations

from math import sqrt

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from syncnorm.tools.compare.records import ArmResult, Comparison
from syncnorm.tools.report.consoles import PlainTable, for_tables
from syncnorm.tools.report.terminal_parity import layer_part, parity_part


def print_comparison(comparison: Comparison, console: Console | None = None) -> None:
    """Prints verdict, tables and legends, 80 to 100 columns wide; plain text where stdout is no terminal."""
    (console or for_tables()).print(render(comparison))


def render(comparison: Comparison) -> RenderableType:
    """The verdict, the tables and their legends, for any rich console."""
    return Group(
        _headline(comparison),
        Text(),
        *_verdict(comparison),
        *parity_part(comparison),
        *layer_part(comparison),
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
        f"{task.model} ({task.num_parameters:,} parameters, {len(task.norm_layers)} norm layers) learns "
        f"{task.num_train:,} samples of {task.data} in {settings.steps} steps:\n"
        f"{settings.world_size} ranks x {settings.batch_per_rank} samples = a global batch of "
        f"{settings.global_batch}, {task.loss}, seed{'s' * (len(settings.seeds) > 1)} {seeds}.\n"
        f"{hardware.device_name}, {hardware.cpu_count} cores, {hardware.threads_per_rank} thread(s) a rank, "
        f"{hardware.backend}, torch {comparison.torch_version}, syncnorm {comparison.syncnorm_version}.\n"
        f"{comparison.date}, {comparison.wall_seconds:.0f} s."
    )


def _verdict(comparison: Comparison) -> list[RenderableType]:
    if not comparison.verdict:
        return []
    sentences = [Padding(Text(sentence), (0, 0, 0, 2)) for sentence in comparison.verdict]
    return [Text("Verdict", style="bold"), *sentences, Text()]


def _result_table(comparison: Comparison) -> PlainTable:
    accuracy = comparison.task.metric == "accuracy"
    ran = [arm for arm in comparison.arms if arm.seeds]
    steps = [point.step for point in (ran[0].seeds[0].test_losses if ran else ())]
    table = PlainTable(f"Result: test {'accuracy' if accuracy else 'loss'} after a number of steps, and speed")
    table.add_column("arm", no_wrap=True)
    for step in steps:
        table.add_column(f"{step:,}", justify="right", no_wrap=True)
    for header in ("over seeds", "samples/s", "wall s"):
        table.add_column(header, justify="right", no_wrap=True)
    for arm in comparison.arms:
        if arm.not_run:
            table.add_row(arm.label, *["-"] * len(steps), "not run", "-", "-")
            continue
        spread = arm.spread_over_seeds(comparison.task.metric)
        table.add_row(
            arm.label,
            *(_result(_mean_at(arm, accuracy, index), accuracy) for index in range(len(steps))),
            "-" if spread is None else f"± {_result(spread, accuracy)}",
            _number(arm.samples_per_second, ",.0f"),
            _number(arm.wall_seconds, ".1f"),
        )
    return table


def _mean_at(arm: ArmResult, accuracy: bool, index: int) -> float | None:
    points = [(run.test_accuracies if accuracy else run.test_losses)[index] for run in arm.seeds]
    values = [point.value for point in points if point.value is not None]
    return sum(values) / len(values) if len(values) == len(points) else None


def _result(value: float | None, accuracy: bool) -> str:
    return _number(value, ".1%" if accuracy else ".3g")


def _result_legend(comparison: Comparison) -> Text:
    num_seeds = len(comparison.settings.seeds)
    mean = f"Mean over {num_seeds} seeds and their standard deviation" if num_seeds > 1 else "Of one seed"
    return Text(
        f"{mean}, on {comparison.task.num_test:,} samples that no arm trained on{_noise(comparison)}. Samples/s: "
        "global batch / median step, without the loading of data; single and dp use one process, the others "
        "all ranks.",
        style="dim",
    )


def _noise(comparison: Comparison) -> str:
    accuracies = [arm.test_accuracy for arm in comparison.arms if arm.test_accuracy is not None]
    if not accuracies:
        return ""
    share = accuracies[0]
    points = 100 * 2 * sqrt(2 * share * (1 - share) / comparison.task.num_test)
    return f"; a difference under {points:.1f} points may be chance"


def _cost_table(comparison: Comparison) -> PlainTable:
    table = PlainTable("Cost of a training step")
    table.add_column("arm", no_wrap=True)
    headers = ("\nms", "ms waiting\nDDP + norm", "collectives\nDDP + norm", "\nKiB sent", "peak MiB\na rank")
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)
    for arm in comparison.arms:
        if not arm.not_run:
            table.add_row(arm.label, *_cost_cells(arm))
    return table


def _cost_cells(arm: ArmResult) -> tuple[str, ...]:
    wait = arm.wait
    return (
        _number(arm.step_seconds and arm.step_seconds * 1e3, ".1f"),
        f"{wait.ddp_seconds * 1e3:.1f} + {wait.norm_seconds * 1e3:.1f}" if wait else "-",
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
    memory = f" Peak: {what[measures.pop()]} while the arm trains, the largest over ranks." if measures else ""
    return Text(
        "Waiting: blocked in collectives, mean over ranks. DDP's is from the last gradient to the end of the "
        "backward, plus its broadcast of buffers. Collectives and KiB: rank 0's calls, and the tensors that it "
        f"hands in.{memory}",
        style="dim",
    )


def _not_run(comparison: Comparison) -> list[Text]:
    return [Text(f"Not run: {arm.label}: {arm.not_run}") for arm in comparison.arms if arm.not_run]
