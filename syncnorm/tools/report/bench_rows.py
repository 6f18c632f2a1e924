"""The layer's rows of a benchmark as a table: times, ratios, and the share of the memory's speed."""

from __future__ import annotations

from rich.text import Text

from syncnorm.tools.bench.memory import PASSES
from syncnorm.tools.bench.records import Benchmark, Memory, Row
from syncnorm.tools.report.consoles import PlainTable

# More decimals would be noise.
RATIO = ".2f"

# How the input lies in memory, by format and dimensions.
_LAYOUTS = {"contiguous": {2: "NC", 3: "NCL", 4: "NCHW", 5: "NCDHW"}, "channels_last": {4: "NHWC"}}
# By name; E[x^2] is what files call it.
_ABOUT = {
    "local": "local: nn.BatchNorm, which talks to nobody.",
    "floor": "floor: local, and beside it the two bare collectives that any synced layer needs.",
    "E[x^2]": "E[x²]: the common work-around, an all_reduce of E[x] and E[x²].",
    "syncnorm": "syncnorm: SyncBatchNorm1d/2d/3d of this package.",
    "torch": "torch: torch.nn.SyncBatchNorm.",
}


def rows_table(benchmark: Benchmark) -> PlainTable:
    """A line a row."""
    others = _others(benchmark.rows)
    table = PlainTable(gap=1)
    for header in ("\nshape", "\nlayout", "\ndtype"):
        table.add_column(header, no_wrap=True)
    names = [name.replace("^2", "²") for name in others]
    headers = ["\nKiB", "\nlocal", *(f"\n{name}" for name in names), "\nsyncnorm", "\np25-p75"]
    headers += [f"ratio\n{names[0]}", f"\n{names[1]}", "copy\nshare"]
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)
    for row in benchmark.rows:
        table.add_row(*_cells(row, others))
    return table


def _others(rows: tuple[Row, ...]) -> tuple[str, str]:
    """Whom syncnorm is set against: where torch's layer runs nobody needs the work-around, and a line is full."""
    return "floor", "torch" if _ran(rows, "torch") else "E[x^2]"


def _cells(row: Row, others: tuple[str, str]) -> list[str]:
    ours = row["syncnorm"]
    cells = [
        "x".join(map(str, row.shape)),
        _LAYOUTS[row.memory_format][len(row.shape)],
        row.dtype,
        _number(row.num_bytes / 1024, ",.0f"),
    ]
    cells += [_micro(row[name].median) for name in ("local", *others)]
    cells += [_micro(ours.median), f"{_micro(ours.p25)}-{_micro(ours.p75)}"]
    cells += [as_ratio(ours.ratio(name)) for name in others]
    cells.append(as_ratio(row.bandwidth_shares.get(ours.name)))
    return cells


def rows_legend(benchmark: Benchmark) -> Text:
    """What the columns are, and why peers are missing."""
    absent = {t.name: t.not_run for row in benchmark.rows for t in row.peers if t.not_run}
    lines = [f"{text} Not run: {absent[name]}" if name in absent else text for name, text in _ABOUT.items()]
    if "E[x^2]" not in _others(benchmark.rows):
        lines.append("E[x²] is in the summary and in files only.")
    lines.append(
        "Medians over the repetitions; p25-p75 is syncnorm's middle half. Ratios: syncnorm's time / theirs in each "
        "repetition, then the median; below 1 syncnorm is faster. KiB: a rank's input, of this dtype; "
        "parameters are fp32."
    )
    if benchmark.memory is not None:
        lines.append(_memory(benchmark.memory))
    if benchmark.hardware.backend == "fake":
        lines.append(
            "fake: collectives without wires or peers. The gather copies this rank's row for each of the others, for "
            "all peers alike; the sum does nothing."
        )
    return Text("\n".join(lines), style="dim")


def _memory(memory: Memory) -> str:
    cache = "the size of the cache is not known"
    if memory.cache_bytes is not None:
        cache = f"the largest cache has {memory.cache_bytes / 2**20:,.0f} MiB"
    return (
        f"Copy share: {PASSES} times the input's bytes, what a batch norm reads and writes, / syncnorm's time, of "
        f"the {memory.copy_bandwidth / 1e9:,.1f} GB/s that a rank reads and writes while all ranks copy; {cache}."
    )


def _ran(rows: tuple[Row, ...], name: str) -> bool:
    return any(timing.name == name and not timing.not_run for row in rows for timing in row.peers)


def _micro(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e6:,.0f}"


def as_ratio(ratio: float | None) -> str:
    """A dash where there is none."""
    return _number(ratio, RATIO)


def _number(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)
