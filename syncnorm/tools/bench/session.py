"""A benchmark as one rank lives through it, together with the other ranks."""

from __future__ import annotations

import time
from collections.abc import Sequence

from syncnorm.tools.bench.gpu_targets import gpu_figures
from syncnorm.tools.bench.layers import measure_row
from syncnorm.tools.bench.memory import measure_memory
from syncnorm.tools.bench.records import Benchmark, Figure, Memory, ModelResult, Row, Settings
from syncnorm.tools.bench.shapes import rows
from syncnorm.tools.bench.statistics import summary
from syncnorm.tools.bench.training import MODEL_STAGES, measure_model
from syncnorm.tools.common.progress import ProgressFactory, silent
from syncnorm.tools.common.provenance import provenance
from syncnorm.tools.common.ranks import Ranks


def measure_on_rank(ranks: Ranks, settings: Settings, command: str, open_progress: ProgressFactory) -> Benchmark:
    """Measures what ``settings`` say; the same record on every rank.

    After each row rank 0 keeps a record of the rows so far, which has no summary yet.

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
            **provenance(ranks.hardware()),
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
                ranks.keep(record(None, ()))
        trained = measure_model(settings, ranks, tell) if model else None
    figures = (
        *summary(measured, trained, settings.device, wires=ranks.backend != "fake"),
        *gpu_figures(measured, memory, settings.device),
    )
    return ranks.share(record(trained, figures) if ranks.rank == 0 else None)
