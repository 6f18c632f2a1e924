"""A benchmark on a terminal: times, ratios within the run, and which targets they meet."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress
from statistics import median

from rich.console import Console, Group, RenderableType
from rich.text import Text

from syncnorm.tools.bench.calls import ACTIVATIONS_BYTES, MAX_SKIPPED
from syncnorm.tools.bench.contenders import (
    CONTENDERS,
    LOCAL,
    LOCAL_AND_COLLECTIVES,
    MEAN_OF_SQUARES,
    TORCH,
    Contender,
)
from syncnorm.tools.bench.layers import PASSES
from syncnorm.tools.bench.model import arm_label
from syncnorm.tools.bench.records import (
    SCALING,
    Benchmark,
    BenchSettings,
    ExchangeLatency,
    LayerRow,
    MemorySpeed,
    ModelResult,
    SummaryLine,
    Timing,
)
from syncnorm.tools.report.consoles import PlainTable, for_tables
from syncnorm.tools.report.scaling_terminal import render_scaling, render_simulation

# Width of the table of rows with all of its columns.
_WIDTH = 100
# Left out on narrower consoles; files have them.
_WIDE_ONLY = ("KiB", "p25-p75")
# More decimals would be noise.
_RATIO = ".2f"
# Of the table of waits; files have all ranks.
_MAX_RANKS = 3
# By memory format and number of dimensions.
_LAYOUTS = {"contiguous": {2: "NC", 3: "NCL", 4: "NCHW", 5: "NCDHW"}, "channels_last": {4: "NHWC"}}
# The label is too wide for a column.
_HEADERS = {LOCAL_AND_COLLECTIVES.name: "local\n+coll."}


def print_benchmark(benchmark: Benchmark, console: Console | None = None) -> None:
    """Prints tables, summary and legend, 80 to 100 columns wide; plain text if stdout is not a terminal."""
    to = console or for_tables()
    to.print(_render(benchmark, narrow=to.width < _WIDTH))


def _render(benchmark: Benchmark, narrow: bool) -> RenderableType:
    parts: list[RenderableType] = [_headline(benchmark)]
    for dtype in dict.fromkeys(row.dtype for row in benchmark.rows):
        of_dtype = [row for row in benchmark.rows if row.dtype == dtype]
        parts += [_title(f"Forward and backward of a layer, {dtype}, microseconds"), _rows_table(of_dtype, narrow)]
    if benchmark.rows:
        parts.append(_rows_legend(benchmark, narrow))
    if benchmark.exchange is not None:
        exchange = benchmark.exchange
        parts += [_title(_exchange_title(exchange)), _exchange_table(exchange), _exchange_legend()]
    if benchmark.growth is not None:
        parts += render_scaling(benchmark.growth, benchmark.hardware.cpu_count)
    if benchmark.simulation is not None:
        parts += render_simulation(benchmark.simulation, benchmark.hardware.cpu_count)
    model = benchmark.model
    if model is not None:
        parts += [_title(_model_title(model)), _arms_table(model), _arms_legend(model)]
    if model is not None and model.profile:
        parts += [_title("Parts of a profiled step of ddp+syncnorm, milliseconds"), _profile_table(model)]
        parts += [_profile_legend(model), _title("Exchanges of each norm layer, milliseconds"), _waits_table(model)]
    if benchmark.summary:
        parts += [_title("Summary"), _summary_table(benchmark.summary)]
    return Group(*parts)


def _headline(benchmark: Benchmark) -> Text:
    settings, hardware = benchmark.settings, benchmark.hardware
    ranks = _scaling_ranks(benchmark) if settings.what == SCALING else _ranks(settings)
    return Text(
        f"{ranks}, {settings.repetitions} repetitions in turn; times per step.\n"
        f"{hardware.device_name}, {hardware.cpu_count} cores, {hardware.threads_per_rank} thread(s) per rank, "
        f"{hardware.backend}.\n"
        f"torch {benchmark.torch_version}, syncnorm {benchmark.syncnorm_version}, {benchmark.date}, "
        f"{benchmark.wall_seconds:.0f} s.{_load(benchmark)}"
    )


def _load(benchmark: Benchmark) -> str:
    if benchmark.load_before is None or benchmark.load_after is None:
        return ""
    return f"\nLoad average: {benchmark.load_before:.1f} before, {benchmark.load_after:.1f} after, ranks included."


def _ranks(settings: BenchSettings) -> str:
    if settings.backend == "fake":
        return f"Rank 0 of {settings.world_size}, without the other ranks"
    if settings.world_size == 1:
        return "1 rank, which synchronizes with itself"
    return f"{settings.world_size} ranks"


def _scaling_ranks(benchmark: Benchmark) -> str:
    if benchmark.growth is None:
        return "No ranks, because the network is given"
    return f"Worlds of {', '.join(map(str, benchmark.growth.worlds))} ranks"


# --- the layer


def _rows_table(rows: Sequence[LayerRow], narrow: bool) -> PlainTable:
    baselines = _shown_baselines(rows)
    headers = [_HEADERS.get(baseline.name, f"\n{baseline.label}") for baseline in baselines]
    times = [f"\n{header}" for header in ("\nKiB", "\nlocal", *headers, "\nsyncnorm", "\np25-p75")]
    # A line has no space for both: the caches of CPUs make the share say less.
    last = "in\nblocks" if _by_call(rows) else "copy\nshare"
    ratios = ["ratio\nto\nlocal", *(f"\n{header.removeprefix('local')}" for header in headers), f"\n{last}"]
    columns = ["\n\nshape", "\n\nlayout", *times, *ratios]
    shown = [not (narrow and header.strip() in _WIDE_ONLY) for header in columns]
    table = PlainTable(gap=1)
    for place, header in enumerate(columns):
        if shown[place]:
            table.add_column(header, justify="left" if place < 2 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*compress(_row_cells(row, baselines), shown))
    return table


def _shown_baselines(rows: Sequence[LayerRow]) -> tuple[Contender, Contender]:
    """Those beside local: a line has space for two. Nobody needs the workaround where torch's layer runs."""
    torch_ran = any(timing.name == TORCH.name and not timing.not_run for row in rows for timing in row.peers)
    return LOCAL_AND_COLLECTIVES, TORCH if torch_ran else MEAN_OF_SQUARES


def _by_call(rows: Sequence[LayerRow]) -> bool:
    return all(row.calls for row in rows)


def _row_cells(row: LayerRow, baselines: Sequence[Contender]) -> list[str]:
    ours, in_blocks = row["syncnorm"], row.in_blocks("syncnorm")
    return [
        "x".join(map(str, row.shape)),
        _LAYOUTS[row.memory_format][len(row.shape)],
        f"{row.num_bytes / 1024:,.0f}",
        *(_microseconds(row[contender.name].median) for contender in (LOCAL, *baselines)),
        _microseconds(ours.median),
        f"{_microseconds(ours.p25)}-{_microseconds(ours.p75)}",
        *(_ratio(ours.ratio(baseline.name)) for baseline in (LOCAL, *baselines)),
        _ratio(row.bandwidth_shares.get(ours.name) if in_blocks is None else in_blocks.ratio(LOCAL.name)),
    ]


def _rows_legend(benchmark: Benchmark, narrow: bool) -> Text:
    reasons = {t.name: t.not_run for row in benchmark.rows for t in row.peers if t.not_run}
    lines = [
        f"{contender.label}: {contender.about}"
        + (f" Not run: {reasons[contender.name]}" if contender.name in reasons else "")
        for contender in CONTENDERS
    ]
    if MEAN_OF_SQUARES not in _shown_baselines(benchmark.rows):
        lines.append("E[x²] is only in the summary and in files.")
    lines.append(_calls_legend(benchmark.rows) if _by_call(benchmark.rows) else _BLOCKS_LEGEND)
    quartiles, sizes = "; p25-p75 are the quartiles of syncnorm", "KiB: the input of a rank, in this dtype"
    if narrow:
        quartiles, sizes = "", f"In {_WIDTH} columns the table also has {' and '.join(_WIDE_ONLY)}"
    lines.append(
        f"Medians{quartiles}. Ratio: the time of syncnorm / the other time in each turn, then the median; below 1, "
        f"syncnorm is faster. {sizes}; parameters are fp32."
    )
    if benchmark.memory is not None:
        lines.append(_memory_legend(benchmark.memory, in_table=not _by_call(benchmark.rows)))
    if benchmark.hardware.backend == "fake":
        lines.append(
            "fake: collectives without wires or other ranks. The gather copies the row of this rank for every other "
            "rank, for all contenders; the sum does nothing."
        )
    return _legend(lines)


_BLOCKS_LEGEND = "Timed in blocks of the same call; times are those of the slowest rank."


def _calls_legend(rows: Sequence[LayerRow]) -> str:
    lateness = [row.lateness for row in rows if row.lateness is not None]
    arrivals, counted = "", "as long as on the rank that needed the least time"
    if lateness:
        counted = (
            "from the arrival of the last rank until all ranks are done, so that waiting for a late rank is no cost"
        )
        arrivals = f" The last rank arrived {_microseconds(median(lateness))} us after the first, in the median."
    return (
        f"Timed call by call, contenders in turn. Before each call a rank reads and writes "
        f"{2 * ACTIVATIONS_BYTES / 2**20:.0f} MiB of other memory, up to {MAX_SKIPPED:.0%} less by rank and call; "
        f"nothing else lines up the ranks. A call counts {counted}.{arrivals} "
        "In blocks: the ratio to local in blocks of the same call, with warm caches and ranks that start together."
    )


def _memory_legend(memory: MemorySpeed, in_table: bool) -> str:
    cache = "the size of the cache is not known"
    if memory.cache_bytes is not None:
        cache = f"the largest cache has {memory.cache_bytes / 2**20:,.0f} MiB"
    return (
        f"Copy share{'' if in_table else ' (in the summary and in files)'}: {PASSES} times the bytes of the input, "
        "which a batch norm reads and writes, / the time of syncnorm, as a share of the "
        f"{memory.copy_bandwidth / 1e9:,.1f} GB/s that a rank reads and writes while all ranks copy; {cache}."
    )


# --- the exchange


def _exchange_title(exchange: ExchangeLatency) -> str:
    size = f"{exchange.num_bytes / 1024:.0f} KiB per rank"
    return f"An exchange of {size}, microseconds, transport: {exchange.transport}"


def _exchange_table(exchange: ExchangeLatency) -> PlainTable:
    table = PlainTable()
    table.add_column("situation", no_wrap=True)
    for header in ("median", "90 %"):
        table.add_column(header, justify="right", no_wrap=True)
    for situation in exchange.situations:
        table.add_row(situation.name, _exchange_time(situation.median), _exchange_time(situation.p90))
    return table


def _exchange_legend() -> Text:
    return _legend(
        [
            "The gather of a layer's forward, with all that surrounds it on the host; counted, and with the same "
            "other work, as the calls above. The late rank is another one at each call."
        ]
    )


def _exchange_time(seconds: float) -> str:
    return f"{seconds * 1e6:,.1f}"


# --- the model


def _model_title(model: ModelResult) -> str:
    shape = "x".join(map(str, model.input_shape))
    return (
        f"A training step of {model.name}, milliseconds: {model.num_parameters:,} parameters, "
        f"{model.num_norm_layers} norm layers,\n{shape} per rank"
    )


def _arms_table(model: ModelResult) -> PlainTable:
    table = PlainTable(gap=1)
    table.add_column("arm", no_wrap=True)
    for header in ("ms", "p25-p75", "ratio to ddp"):
        table.add_column(header, justify="right", no_wrap=True)
    for arm in model.arms:
        table.add_row(arm_label(arm.name), *_arm_cells(arm))
    return table


def _arm_cells(arm: Timing) -> tuple[str, ...]:
    if arm.not_run or arm.median is None or arm.p25 is None or arm.p75 is None:
        return ("not run", "-", "-")
    return (f"{arm.median * 1e3:,.1f}", f"{arm.p25 * 1e3:,.1f}-{arm.p75 * 1e3:,.1f}", _ratio(arm.ratio("ddp")))


def _arms_legend(model: ModelResult) -> Text:
    lines = [f"Not run: {arm_label(arm.name)}: {arm.not_run}" for arm in model.arms if arm.not_run]
    lines.append(
        "DistributedDataParallel, cross-entropy, SGD with momentum; the arms take turns, "
        f"{model.steps_per_block} step(s) each, timed on the slowest rank. ddp has nn.BatchNorm2d, ddp+collectives "
        "two bare collectives at each of them as well, and ddp+syncnorm is the same model converted."
    )
    return _legend(lines)


def _profile_table(model: ModelResult) -> PlainTable:
    table = PlainTable(gap=1)
    for header in ("rank", "step", "compute", "norm, forward", "norm, backward", "rest"):
        table.add_column(header, justify="right", no_wrap=True)
    for rank in model.profile:
        forward = sum(wait.forward_ms for wait in rank.layers)
        backward = sum(wait.backward_ms for wait in rank.layers)
        parts = (rank.step_ms, rank.compute_ms, forward, backward, rank.rest_ms)
        table.add_row(str(rank.rank), *(f"{part:,.2f}" for part in parts))
    return table


def _profile_legend(model: ModelResult) -> Text:
    return _legend(
        [
            f"Means of {model.profile[0].steps} steps under torch.profiler, which slows them down. Norm: inside "
            "the exchanges of the norm layers, mostly waiting for the other ranks. Compute: until the last gradient "
            "is ready, without norm. Rest: after that, the remaining wait of DDP, and the optimizer."
        ]
    )


def _waits_table(model: ModelResult) -> PlainTable:
    table = PlainTable(gap=1)
    table.add_column("\nlayer", no_wrap=True)
    shown = model.profile[:_MAX_RANKS]
    for rank in shown:
        table.add_column(f"rank {rank.rank}\nforward", justify="right", no_wrap=True)
        table.add_column("\nbackward", justify="right", no_wrap=True)
    by_rank = [{wait.layer: wait for wait in rank.layers} for rank in shown]
    for layer in by_rank[0]:
        waits = [waits.get(layer) for waits in by_rank]
        cells = [(f"{w.forward_ms:,.2f}", f"{w.backward_ms:,.2f}") if w else ("-", "-") for w in waits]
        table.add_row(layer, *(cell for pair in cells for cell in pair))
    return table


# --- the summary


def _summary_table(summary: Sequence[SummaryLine]) -> PlainTable:
    table = PlainTable(gap=1)
    table.add_column("means are geometric", no_wrap=True)
    table.add_column("figure", justify="right", no_wrap=True)
    table.add_column("target", no_wrap=True)
    table.add_column("")
    for line in summary:
        target = "" if line.limit is None else f"{'>=' if line.at_least else '<='} {_figure(line.limit)}"
        table.add_row(line.what, _figure(line.value), target, _verdict(line))
    return table


def _figure(value: float | None) -> str:
    return _ratio(value) if value is None or value < 10 else f"{value:,.0f}"


def _verdict(line: SummaryLine) -> Text:
    verdict = Text("not measured" if line.value is None else "")
    if line.met is not None:
        verdict.append("met" if line.met else "not met", style="bold green" if line.met else "bold red")
    if line.where:
        verdict.append(f"{', ' if verdict else ''}{line.where}")
    return verdict


def _title(text: str) -> Text:
    # Not the title of the table, which would be wrapped at the width of the table.
    return Text(f"\n{text}", style="bold")


def _legend(lines: Sequence[str]) -> Text:
    return Text("\n".join(lines), style="dim")


def _microseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e6:,.0f}"


def _ratio(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:{_RATIO}}"
