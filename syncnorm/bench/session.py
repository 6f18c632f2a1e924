"""A benchmark as one rank lives through it, together with the other ranks."""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from datetime import datetime, timezone

import torch

import syncnorm
from syncnorm.bench.gpu_targets import gpu_figures
from syncnorm.bench.layers import measure_row
from syncnorm.bench.memory import measure_memory
from syncnorm.bench.progress import ProgressFactory, silent
from syncnorm.bench.records import Benchmark, Figure, Memory, ModelResult, Row, Settings
from syncnorm.bench.shapes import rows
from syncnorm.bench.statistics import summary
from syncnorm.bench.training import MODEL_STAGES, measure_model
from syncnorm.notes import Keep, nobody_keeps
from syncnorm.ranks import Ranks


def measure_on_rank(
    settings: Settings, command: str, ranks: Ranks, open_progress: ProgressFactory, keep: Keep = nobody_keeps
) -> Benchmark:
    """Measures what ``settings`` say; the same record on every rank.

    After each row rank 0 calls ``keep`` with the rows so far, which have no summary yet.

    Collective: all ranks.
    """
    started = time.perf_counter()
    layer, model = settings.what != "model", settings.what != "layer"
    todo = [(*row, dtype) for dtype in settings.dtypes for row in rows(settings.device, settings.shapes) if layer]
    watcher = open_progress if ranks.rank == 0 else silent
    measured: list[Row] = []
    memory: Memory | None = None

    def record(trained: ModelResult | None, figures: Sequence[Figure]) -> Benchmark:
        return Benchmark(
            settings=settings,
            hardware=ranks.hardware(),
            syncnorm_version=syncnorm.__version__,
            torch_version=torch.__version__,
            python_version=platform.python_version(),
            date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            command=command,
            rows=tuple(measured),
            model=trained,
            summary=tuple(figures),
            memory=memory,
            wall_seconds=time.perf_counter() - started,
        )

    with watcher(len(todo) + MODEL_STAGES * model) as tell:
        if layer:
            memory = measure_memory(ranks)
            how = (ranks, settings.repetitions, settings.block_seconds, memory.copy_bandwidth)
            for shape, memory_format, dtype in todo:
                tell(f"{'x'.join(map(str, shape))} {memory_format} {dtype}")
                measured.append(measure_row(shape, memory_format, dtype, *how))
                if ranks.rank == 0:
                    keep(record(None, ()))
        trained = measure_model(settings, ranks, tell) if model else None
    figures = (
        *summary(measured, trained, settings.device, wires=ranks.backend != "fake"),
        *gpu_figures(measured, memory, settings.device),
    )
    return ranks.share(record(trained, figures) if ranks.rank == 0 else None)
