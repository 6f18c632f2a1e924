"""A benchmark on a terminal: times, ratios inside the run, and which targets they meet."""

from __future__ import annotations

from rich.console import Console, Group, RenderableType
from rich.text import Text

from syncnorm.tools.bench.records import Benchmark, Figure, ModelResult, Settings, Timing
from syncnorm.tools.report.bench_rows import RATIO, as_ratio, rows_legend, rows_table
from syncnorm.tools.report.consoles import PlainTable, for_tables
from syncnorm.tools.report.growth_terminal import render_growth, render_simulation

# What the table of rows needs.
WIDTH = 100
# Of the table of waits; files have all ranks.
MAX_RANKS = 3


def print_benchmark(benchmark: Benchmark, console: Console | None = None) -> None:
    """Prints tables, summary and legend, at most 100 columns wide; plain text where stdout is no terminal."""
    (console or for_tables(WIDTH)).print(render(benchmark))


def render(benchmark: Benchmark) -> RenderableType:
    """Everything that there is to show, for any rich console."""
    parts: list[RenderableType] = [_headline(benchmark)]
    if benchmark.rows:
        parts += [_title("A layer's forward and backward, microseconds"), rows_table(benchmark)]
        parts += [rows_legend(benchmark)]
    if benchmark.growth is not None:
        parts += render_growth(benchmark.growth, benchmark.hardware.cpu_count)
    if benchmark.simulation is not None:
        parts += render_simulation(benchmark.simulation, benchmark.hardware.cpu_count)
    model = benchmark.model
    if model is not None:
        parts += [_title(_model_title(model)), _model_table(model), _model_legend(model)]
    if model is not None and model.profile:
        parts += [_title("Where a profiled step of ddp+syncnorm goes, milliseconds"), _split_table(model)]
        parts += [_split_legend(model), _title("Milliseconds in each norm layer's exchanges"), _waits_table(model)]
    if benchmark.summary:
        parts += [_title("Summary"), _summary_table(benchmark)]
    return Group(*parts)


def _headline(benchmark: Benchmark) -> Text:
    settings, hardware = benchmark.settings, benchmark.hardware
    who = _growing(benchmark) if settings.what == "growth" else _world(settings)
    return Text(
        f"{who}, {settings.repetitions} repetitions in turns; times are a step's on the "
        f"slowest rank.\n"
        f"{hardware.device_name}, {hardware.cpu_count} cores, {hardware.threads_per_rank} thread(s) a rank, "
        f"{hardware.backend}.\n"
        f"torch {benchmark.torch_version}, syncnorm {benchmark.syncnorm_version}, {benchmark.date}, "
        f"{benchmark.wall_seconds:.0f} s."
    )


def _world(settings: Settings) -> str:
    if settings.backend == "fake":
        return f"Rank 0 of {settings.world_size}, the others made up"
    return "1 rank, which syncs with itself" if settings.world_size == 1 else f"{settings.world_size} ranks"


def _growing(benchmark: Benchmark) -> str:
    if benchmark.growth is None:
        return "No ranks, for the network is given"
    return f"Worlds of {', '.join(map(str, benchmark.growth.worlds))} ranks"


def _title(text: str) -> Text:
    # Not the table's own title, which would be broken where the table ends.
    return Text(f"\n{text}", style="bold")


def _model_title(model: ModelResult) -> str:
    shape = "x".join(map(str, model.input_shape))
    return (
        f"A training step of {model.name}, milliseconds: {model.num_parameters:,} parameters, "
        f"{model.num_norm_layers} norm layers,\n{shape} a rank"
    )


def _model_table(model: ModelResult) -> PlainTable:
    table = PlainTable(gap=1)
    table.add_column("arm", no_wrap=True)
    for header in ("ms", "p25-p75", "ratio to ddp"):
        table.add_column(header, justify="right", no_wrap=True)
    for arm in model.arms:
        table.add_row(arm.name, *_arm_cells(arm))
    return table


def _arm_cells(arm: Timing) -> tuple[str, ...]:
    if arm.not_run or arm.median is None or arm.p25 is None or arm.p75 is None:
        return ("not run", "-", "-")
    return (f"{arm.median * 1e3:,.1f}", f"{arm.p25 * 1e3:,.1f}-{arm.p75 * 1e3:,.1f}", as_ratio(arm.ratio("ddp")))


def _model_legend(model: ModelResult) -> Text:
    lines = [f"Not run: {arm.name}: {arm.not_run}" for arm in model.arms if arm.not_run]
    lines.append(
        "DistributedDataParallel, cross-entropy, SGD with momentum; the arms take turns, "
        f"{model.steps_per_block} step(s) each. ddp has nn.BatchNorm2d, ddp+floor beside each of "
        "them two bare collectives, ddp+syncnorm the same model converted."
    )
    return Text("\n".join(lines), style="dim")


def _split_table(model: ModelResult) -> PlainTable:
    table = PlainTable(gap=1)
    for header in ("rank", "step", "compute", "norm, forward", "norm, backward", "rest"):
        table.add_column(header, justify="right", no_wrap=True)
    for rank in model.profile:
        forward, backward = (sum(getattr(w, name) for w in rank.layers) for name in ("forward_ms", "backward_ms"))
        parts = (rank.step_ms, rank.compute_ms, forward, backward, rank.rest_ms)
        table.add_row(str(rank.rank), *(_milli(part) for part in parts))
    return table


def _waits_table(model: ModelResult) -> PlainTable:
    table = PlainTable(gap=1)
    table.add_column("\nlayer", no_wrap=True)
    shown = model.profile[:MAX_RANKS]
    for rank in shown:
        table.add_column(f"rank {rank.rank}\nforward", justify="right", no_wrap=True)
        table.add_column("\nbackward", justify="right", no_wrap=True)
    by_rank = [{wait.layer: wait for wait in rank.layers} for rank in shown]
    for layer in by_rank[0]:
        waits = [waits.get(layer) for waits in by_rank]
        cells = [(_milli(w.forward_ms), _milli(w.backward_ms)) if w else ("-", "-") for w in waits]
        table.add_row(layer, *(cell for pair in cells for cell in pair))
    return table


def _split_legend(model: ModelResult) -> Text:
    return Text(
        f"Means of {model.profile[0].steps} steps under torch.profiler, which slows them. Norm: inside the exchanges "
        "of the norm layers, mostly waiting for the other ranks. Compute: until the last gradient is there, less "
        "norm. Rest: from then on, what DDP still waits for and the optimiser.",
        style="dim",
    )


def _milli(milliseconds: float) -> str:
    return f"{milliseconds:,.2f}"


def _summary_table(benchmark: Benchmark) -> PlainTable:
    table = PlainTable(gap=1)
    table.add_column("ratio", no_wrap=True)
    table.add_column("figure", justify="right", no_wrap=True)
    table.add_column("target", no_wrap=True)
    table.add_column("", no_wrap=True)
    for figure in benchmark.summary:
        target = "" if figure.limit is None else f"{'>=' if figure.at_least else '<='} {figure.limit:{RATIO}}"
        table.add_row(figure.what, as_ratio(figure.value), target, _verdict(figure))
    return table


def _verdict(figure: Figure) -> Text:
    verdict = Text("not measured" if figure.value is None else "")
    if figure.met is not None:
        verdict.append("met" if figure.met else "not met", style="bold green" if figure.met else "bold red")
    if figure.where:
        verdict.append(f"{', ' if verdict else ''}{figure.where}")
    return verdict
