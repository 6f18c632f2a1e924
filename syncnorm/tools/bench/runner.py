"""``run_layer``, ``run_model``, or both: check the arguments, find or start the ranks, and have them measure.

Under a launcher they use its ranks; otherwise they start gloo ranks on this machine, which share its GPUs if the
device is ``"cuda"``. A rank on a CPU uses one thread.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from syncnorm.errors import InputError
from syncnorm.tools.bench.exchange_latency import measure_exchange
from syncnorm.tools.bench.layers import measure_memory, measure_row
from syncnorm.tools.bench.model import MODEL_STAGES, make_folder, measure_model
from syncnorm.tools.bench.records import (
    DEFAULT_BATCH_PER_RANK,
    DEFAULT_REPETITIONS,
    Benchmark,
    BenchSettings,
    ExchangeLatency,
    LayerRow,
    MemorySpeed,
    ModelResult,
    SummaryLine,
    row_label,
)
from syncnorm.tools.bench.shapes import DTYPES, Shape, rows
from syncnorm.tools.bench.single_process import check_single_process, single_process_world
from syncnorm.tools.bench.summary import exchange_summary, gpu_summary, summary
from syncnorm.tools.common.launcher import launched_world_size
from syncnorm.tools.common.progress import ProgressFactory, silent
from syncnorm.tools.common.provenance import command_line, provenance
from syncnorm.tools.common.ranks import (
    Keep,
    Ranks,
    a_gpu_for_each_launched_rank,
    discard,
    ranks_for,
    torch_threads,
    world_size_for,
)

BACKENDS = ("gloo", "nccl", "fake")
# Only ends a run whose ranks hang.
_TIMEOUT_S = 6 * 3600.0
_QUICK_REPETITIONS = 2
_QUICK: dict[str, Any] = {"block_seconds": 0.002, "side": 16, "width": 8}


@dataclass(frozen=True)
class RunOptions:
    """What every benchmark can be given.

    Attributes:
        ranks: number of ranks; under a launcher, None or the launcher's number. None is the default of the benchmark.
        repetitions: blocks per contender, and the fewest single calls of a layer; 15 by default, 2 if ``quick``.
        quick: run few repetitions of short blocks, to see that everything works; the figures mean little.
        progress: opened by rank 0, in its own process, to report the progress.
        keep: called on rank 0 with a record of what has been measured so far, at the latest before an error is
            raised.
    """

    ranks: int | None = None
    repetitions: int | None = None
    quick: bool = False
    progress: ProgressFactory = silent
    keep: Keep = discard


def run_layer(
    options: RunOptions,
    *,
    device: str | None = None,
    backend: str | None = None,
    dtypes: Sequence[str] = tuple(DTYPES),
    shapes: Sequence[Shape] | None = None,
) -> Benchmark:
    """Times a forward and a backward of the synchronized layer and of other implementations.

    Args:
        options: see `RunOptions`.
        device: ``"cpu"`` or ``"cuda"``; by default cuda if there is a GPU.
        backend: ``"gloo"``, the default, starts ranks. The others run in this process alone: ``"fake"`` is rank 0 of
            a world of ``options.ranks`` (8 by default) without the other ranks, ``"nccl"`` a rank that synchronizes
            with itself.
        dtypes: of the input, names out of ``DTYPES``.
        shapes: of the input of a rank; the table of the device by default.

    Returns:
        The record, the same on every rank.

    Raises:
        InputError: an invalid argument; raised before anything starts, on every rank.

    Collective: under a launcher, all ranks.
    """
    for name in dtypes:
        if name not in DTYPES:
            raise InputError(f"unknown dtype {name!r}: expected one of {', '.join(DTYPES)}")
    device = _device(device)
    settings = settings_for(
        "layer",
        options,
        world_size=_world_size(options, backend, device),
        device=device,
        dtypes=tuple(dict.fromkeys(dtypes)),
        shapes=None if shapes is None else tuple(shapes),
        backend=backend,
    )
    return _measure(settings, options)


def run_model(
    options: RunOptions,
    *,
    device: str | None = None,
    backend: str | None = None,
    batch_per_rank: int = DEFAULT_BATCH_PER_RANK,
    compiled: bool = False,
    profile: Path | None = None,
) -> Benchmark:
    """Times the training step of a residual network with synchronized batch norm, compared with plain DDP.

    Args:
        options: see `RunOptions`; if ``quick``, the network is narrow and the images are small.
        device: as for `run_layer`.
        backend: as for `run_layer`, without ``"fake"``.
        batch_per_rank: images per rank and step.
        compiled: time the compiled model too.
        profile: a folder for traces of the step of the synchronized model.

    Returns:
        The record, the same on every rank.

    Raises:
        InputError: an invalid argument; raised before anything starts, on every rank.

    Collective: under a launcher, all ranks.
    """
    if batch_per_rank < 1:
        raise InputError(f"batch_per_rank must be at least 1, got {batch_per_rank}")
    if backend == "fake":
        raise InputError("DistributedDataParallel does not run over the fake backend: only the layer does")
    if backend == "nccl" and profile is not None:
        raise InputError("a profile shows how long ranks wait for each other, but nccl runs as a single rank here")
    device = _device(device)
    settings = settings_for(
        "model",
        options,
        world_size=_world_size(options, backend, device),
        device=device,
        batch_per_rank=batch_per_rank,
        compiled=compiled,
        profile=None if profile is None else str(profile),
        backend=backend,
    )
    if profile is not None:
        make_folder(profile)
    return _measure(settings, options)


def run_layer_and_model(options: RunOptions, *, device: str | None = None) -> Benchmark:
    """`run_layer` and `run_model` with their defaults, on the same ranks and in one record; see there."""
    device = _device(device)
    settings = settings_for("all", options, world_size=_world_size(options, None, device), device=device)
    return _measure(settings, options)


def settings_for(what: str, options: RunOptions, **given: Any) -> BenchSettings:
    """The settings of a benchmark, of which ``given`` are those that only some have.

    Raises:
        InputError: the number of repetitions is not positive.
    """
    repetitions = options.repetitions
    if repetitions is None:
        repetitions = _QUICK_REPETITIONS if options.quick else DEFAULT_REPETITIONS
    if repetitions < 1:
        raise InputError(f"repetitions must be at least 1, got {repetitions}")
    if options.quick:
        given |= _QUICK
    return BenchSettings(what=what, repetitions=repetitions, **given)


def _device(requested: str | None) -> str:
    if requested not in (None, "cpu", "cuda"):
        raise InputError(f"device must be cpu or cuda, got {requested!r}")
    # Started ranks use gloo and can share a GPU; a launcher's ranks use NCCL, which refuses that.
    usable = torch.cuda.is_available() and (launched_world_size() is None or a_gpu_for_each_launched_rank())
    if requested == "cuda" and not usable:
        why = "there is no GPU" if not torch.cuda.is_available() else "the launcher started more ranks than GPUs"
        raise InputError(f"device is cuda, but {why}: leave --device out, or use --device cpu")
    return requested or ("cuda" if usable else "cpu")


def _world_size(options: RunOptions, backend: str | None, device: str) -> int:
    if backend not in (None, *BACKENDS):
        raise InputError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend is not None and launched_world_size() is not None:
        raise InputError(f"backend is {backend}, but a launcher's ranks already have one: leave --backend out")
    if backend in (None, "gloo"):
        return world_size_for("bench", options.ranks)
    return check_single_process(backend, options.ranks, device)


def _measure(settings: BenchSettings, options: RunOptions) -> Benchmark:
    command = command_line()
    on_cpu = settings.device == "cpu"
    with torch_threads(1 if on_cpu else torch.get_num_threads()):
        if settings.backend in ("fake", "nccl"):
            with single_process_world(settings.backend, settings.world_size, settings.device) as ranks:
                return measure_on_rank(replace(ranks, keep=options.keep), settings, command, options.progress)
        with ranks_for(settings.world_size, _TIMEOUT_S, device=settings.device, cpu=on_cpu) as on_ranks:
            return on_ranks(measure_on_rank, settings, command, options.progress, keep=options.keep)


def measure_on_rank(ranks: Ranks, settings: BenchSettings, command: str, progress: ProgressFactory) -> Benchmark:
    """Measures what ``settings`` request; returns the same record on every rank.

    After each row rank 0 keeps a record of the rows so far, without a summary.

    Collective: all ranks.
    """
    started, load_before = time.perf_counter(), _load()
    layer, model = settings.what != "model", settings.what != "layer"
    pending = [(*row, dtype) for dtype in settings.dtypes for row in rows(settings.device, settings.shapes) if layer]
    measured: list[LayerRow] = []
    memory: MemorySpeed | None = None
    exchange: ExchangeLatency | None = None

    def record(result: ModelResult | None, lines: Sequence[SummaryLine]) -> Benchmark:
        return Benchmark(
            settings=settings,
            **provenance(ranks.hardware()),
            command=command,
            rows=tuple(measured),
            model=result,
            summary=tuple(lines),
            memory=memory,
            exchange=exchange,
            load_before=load_before,
            load_after=_load(),
            wall_seconds=time.perf_counter() - started,
        )

    with (progress if ranks.rank == 0 else silent)(len(pending) + MODEL_STAGES * model) as tell:
        if layer:
            memory = measure_memory(ranks)
            exchange = measure_exchange(settings, ranks)
            for row in pending:
                tell(row_label(*row))
                measured.append(measure_row(*row, settings, memory, ranks))
                ranks.keep(record(None, ()))
        result = measure_model(settings, ranks, tell) if model else None
    lines = summary(measured, result, settings.device, wires=ranks.backend != "fake")
    lines += gpu_summary(measured, memory, settings.device)
    lines += exchange_summary(exchange)
    return ranks.share(record(result, lines) if ranks.rank == 0 else None)


def _load() -> float | None:
    """The load average of this host over the last minute; None where the system does not report it."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None
