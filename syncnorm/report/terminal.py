"""A comparison on a terminal: what differs from one process, what it costs, and how to read both."""

from __future__ import annotations

from math import sqrt

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from syncnorm.compare.evidence import Gap, Parity
from syncnorm.compare.records import ArmResult, Comparison

# fp32 carries 1.2e-7 of relative precision; sums over a batch in another order lose a digit of it. What an
# arm computes differently shows up above 1e-3.
ROUNDING = 1e-5
# Longer lines of text are hard to read.
WIDTH = 100
# What the tables need.
TABLE_WIDTH = 80


def print_comparison(comparison: Comparison, console: Console | None = None) -> None:
    """Prints tables and legend, 80 to 100 columns wide; plain text where stdout is no terminal."""
    if console is None:
        console = Console(highlight=False)
        # Wider than a narrow terminal if need be: it wraps lines, where a table that fits would cut the figures.
        console.width = WIDTH if not console.is_terminal else min(WIDTH, max(TABLE_WIDTH, console.width))
    console.print(render(comparison))


def render(comparison: Comparison) -> RenderableType:
    """The tables and their legend, for any rich console."""
    return Group(
        _headline(comparison),
        Text(),
        _parity_table(comparison),
        Text(_PARITY_LEGEND, style="dim"),
        Text(),
        _cost_table(comparison),
        _cost_legend(comparison),
        *_not_run(comparison),
    )


def _headline(comparison: Comparison) -> Text:
    settings, hardware = comparison.settings, comparison.hardware
    return Text(
        f"A residual CNN ({comparison.num_parameters:,} parameters, {comparison.num_norm_layers} norm layers)"
        f" learns {comparison.num_train:,} digits in {settings.steps} steps:\n"
        f"{settings.world_size} ranks x {settings.batch_per_rank} images = a global batch of "
        f"{settings.global_batch}, seed {settings.seed}.\n"
        f"{hardware.device_name}, {hardware.cpu_count} cores, {hardware.threads_per_rank} thread(s) a rank, "
        f"{hardware.backend}, torch {comparison.torch_version}, syncnorm {comparison.syncnorm_version}.\n"
        f"{comparison.date}, {comparison.wall_seconds:.0f} s."
    )


def _table(title: str) -> Table:
    return Table(
        title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0)
    )


def _parity_table(comparison: Comparison) -> Table:
    steps = dict.fromkeys((1, comparison.settings.parity_steps))
    table = _table(f"Difference to single, relative, after step {' and after step '.join(map(str, steps))}")
    table.add_column("arm", no_wrap=True)
    for step in steps:
        for index, kind in enumerate(("weights", "mean", "var")):
            table.add_column(f"{f'step {step}' if index == 0 else ''}\n{kind}", justify="right", no_wrap=True)
    table.add_column("\nlike single?", no_wrap=True)
    for arm in comparison.arms:
        if arm.not_run:
            continue
        by_step = {parity.step: parity for parity in arm.parity}
        gaps = [gap for step in steps for gap in _gaps(by_step.get(step))]
        table.add_row(arm.label, *(_gap_text(gap) for gap in gaps), _verdict(arm))
    return table


def _gaps(parity: Parity | None) -> tuple[Gap | None, Gap | None, Gap | None]:
    return (parity.params, parity.running_mean, parity.running_var) if parity else (None, None, None)


def _gap_text(gap: Gap | None) -> Text:
    if gap is None:
        return Text("-")
    if gap.max_rel == 0:
        return Text("0")
    return Text(f"{gap.max_rel:.0e}", style="green" if gap.max_rel <= ROUNDING else "red")


def _verdict(arm: ArmResult) -> Text:
    if not arm.parity:
        return Text("-")
    gaps = _gaps(arm.parity[0])
    if arm.name == "single":
        return Text("the reference")
    if gaps[1] is None:
        return Text("no (another norm)")
    if all(gap is not None and gap.max_rel <= ROUNDING for gap in gaps):
        return Text("yes (fp32 rounding)", style="bold green")
    return Text("no (other stats)", style="bold red")


_PARITY_LEGEND = (
    "max|a - b| / max|b| over all weights, running means, running variances (rank 0's, as DDP saves them). "
    "Every arm starts from the same weights and gets the same global batches: one that trains like one process "
    "differs by fp32 rounding alone, about 1e-7. That grows with the steps, so judge by the first. "
    "A '-' stands where the arm's norm keeps no running statistics."
)


def _cost_table(comparison: Comparison) -> Table:
    table = _table("Result and cost")
    table.add_column("arm", no_wrap=True)
    headers = (
        "test\naccuracy",
        "\nimages/s",
        "ms a\nstep",
        "collectives a step\nDDP + norm",
        "KiB a\nstep",
        "wall\ns",
    )
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)
    for arm in comparison.arms:
        if arm.not_run:
            table.add_row(arm.label, "not run", *["-"] * (len(headers) - 1))
        else:
            table.add_row(arm.label, *_cost_cells(arm))
    return table


def _cost_cells(arm: ArmResult) -> tuple[str, ...]:
    ddp, norm = arm.calls("ddp"), arm.calls("norm")
    return (
        _number(arm.test_accuracy, ".1%"),
        _number(arm.samples_per_second, ",.0f"),
        _number(arm.step_seconds and arm.step_seconds * 1e3, ".1f"),
        f"{ddp} + {norm}" if arm.collectives else "0",
        _number(arm.payload_bytes / 1024, ",.1f") if arm.collectives else "0",
        _number(arm.wall_seconds, ".1f"),
    )


def _number(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


def _cost_legend(comparison: Comparison) -> Text:
    return Text(
        f"Accuracy on {comparison.num_test} images that no arm trained on{_noise(comparison)}. Images/s: global "
        "batch / median step; single and dp use one process, the others all ranks. Collectives: rank 0's calls "
        "in a step, by DDP + by the norm layers; KiB: the tensors that it hands in.",
        style="dim",
    )


def _noise(comparison: Comparison) -> str:
    accuracies = [arm.test_accuracy for arm in comparison.arms if arm.test_accuracy is not None]
    if not accuracies:
        return ""
    share = accuracies[0]
    points = 100 * 2 * sqrt(2 * share * (1 - share) / comparison.num_test)
    return f"; a difference under {points:.1f} points may be chance"


def _not_run(comparison: Comparison) -> list[Text]:
    return [Text(f"Not run: {arm.label}: {arm.not_run}") for arm in comparison.arms if arm.not_run]
