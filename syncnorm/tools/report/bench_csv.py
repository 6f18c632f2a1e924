"""The rows of a benchmark as a CSV file: a line a peer, each with where and when it was measured."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

from syncnorm.tools.bench.records import Benchmark
from syncnorm.tools.common.files import write_file

COLUMNS = (
    "peer",
    "shape",
    "memory_format",
    "dtype",
    "num_bytes",
    "median_us",
    "p25_us",
    "p75_us",
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
    "device",
    "cpu_count",
    "threads_per_rank",
    "backend",
    "python",
    "torch",
    "syncnorm",
    "date",
)


def write_csv(benchmark: Benchmark, path: Path) -> None:
    """Writes ``path``, replacing what is there. Microseconds a step; empty where there is no figure."""
    text = StringIO()
    writer = csv.writer(text)
    writer.writerow(COLUMNS)
    writer.writerows(_lines(benchmark))
    write_file(path, text.getvalue().encode())


def _lines(benchmark: Benchmark) -> Iterator[tuple[object, ...]]:
    settings, hardware = benchmark.settings, benchmark.hardware
    where = (
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
        for peer in row.peers:
            yield (
                peer.name,
                shape,
                row.memory_format,
                row.dtype,
                row.num_bytes,
                *(_micro(seconds) for seconds in (peer.median, peer.p25, peer.p75)),
                *(_ratio(peer.ratio(name)) for name in ("floor", "E[x^2]", "torch")),
                _ratio(row.bandwidth_shares.get(peer.name)),
                copy_bandwidth,
                row.input_sets,
                peer.not_run or "",
                settings.world_size,
                settings.repetitions,
                row.steps_per_block,
                *where,
            )


def _micro(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e6:.2f}"


def _ratio(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.4f}"
