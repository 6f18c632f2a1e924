"""The rows of a benchmark as a CSV file: one line per contender, with the hardware, versions and date."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

from syncnorm.tools.bench.contenders import LOCAL, LOCAL_AND_COLLECTIVES, MEAN_OF_SQUARES, TORCH
from syncnorm.tools.bench.records import Benchmark
from syncnorm.tools.common.files import write_file

# Stable like the keys of the JSON file: "peer" is the contender, "floor" is "local + collectives".
COLUMNS = (
    "peer",
    "shape",
    "memory_format",
    "dtype",
    "num_bytes",
    "median_us",
    "p25_us",
    "p75_us",
    "ratio_to_local",
    "ratio_to_floor",
    "ratio_to_mean_of_squares",
    "ratio_to_torch",
    "bandwidth_share",
    "copy_bandwidth_gb",
    "input_sets",
    "not_run",
    "ranks",
    "repetitions",
    "steps_per_block",
    "calls",
    "blocks_median_us",
    "blocks_ratio_to_local",
    "device",
    "cpu_count",
    "threads_per_rank",
    "backend",
    "python",
    "torch",
    "syncnorm",
    "date",
)
_BASELINES = (LOCAL.name, LOCAL_AND_COLLECTIVES.name, MEAN_OF_SQUARES.name, TORCH.name)


def write_csv(benchmark: Benchmark, path: Path) -> None:
    """Writes ``path``, replacing what is there. Times are microseconds per step; missing figures are empty."""
    text = StringIO()
    writer = csv.writer(text)
    writer.writerow(COLUMNS)
    writer.writerows(_lines(benchmark))
    write_file(path, text.getvalue().encode())


def _lines(benchmark: Benchmark) -> Iterator[tuple[object, ...]]:
    settings, hardware = benchmark.settings, benchmark.hardware
    run = (
        hardware.device_name,
        hardware.cpu_count,
        hardware.threads_per_rank,
        hardware.backend,
        benchmark.python_version,
        benchmark.torch_version,
        benchmark.syncnorm_version,
        benchmark.date,
    )
    copy_bandwidth = "" if benchmark.memory is None else f"{benchmark.memory.copy_bandwidth / 1e9:.2f}"
    for row in benchmark.rows:
        shape = "x".join(map(str, row.shape))
        for timing in row.peers:
            blocks = row.in_blocks(timing.name)
            yield (
                timing.name,
                shape,
                row.memory_format,
                row.dtype,
                row.num_bytes,
                *(_microseconds(seconds) for seconds in (timing.median, timing.p25, timing.p75)),
                *(_ratio(timing.ratio(baseline)) for baseline in _BASELINES),
                _ratio(row.bandwidth_shares.get(timing.name)),
                copy_bandwidth,
                row.input_sets,
                timing.not_run or "",
                settings.world_size,
                settings.repetitions,
                row.steps_per_block,
                row.calls,
                _microseconds(None if blocks is None else blocks.median),
                _ratio(None if blocks is None else blocks.ratio(LOCAL.name)),
                *run,
            )


def _microseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e6:.2f}"


def _ratio(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.4f}"
