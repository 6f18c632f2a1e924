"""``run_growth``: checks what is asked, has worlds of own ranks measured, and asks the cost model."""

from __future__ import annotations

import time
from dataclasses import replace

import torch
import torch.distributed as dist

from syncnorm.errors import InputError
from syncnorm.tools.bench.growth import GROWTH_STAGES, measure_growth
from syncnorm.tools.bench.growth_records import Growth, Simulation
from syncnorm.tools.bench.host_cost import measure_host
from syncnorm.tools.bench.records import Benchmark, Settings
from syncnorm.tools.bench.simulation import LARGEST, Parameters, simulate
from syncnorm.tools.common.launcher import launched_world_size
from syncnorm.tools.common.progress import ProgressFactory, silent
from syncnorm.tools.common.provenance import hardware_of, provenance
from syncnorm.tools.common.ranks import Keep, Ranks, discard, ranks_for, torch_threads

DEFAULT_LARGEST_WORLD = 4
# Longer than where the contenders are alike: a block begins with ranks that wake up.
GROWTH_BLOCK_SECONDS = 0.04
CPU = torch.device("cpu")
# Only to end a run whose ranks hang.
TIMEOUT_S = 3600.0


def check_growth(ranks: int | None, device: str | None, largest: int | None, parameters: Parameters) -> int:
    """How many ranks the largest measured world has; 0 where nothing of the network has to be measured.

    Raises:
        InputError: that cannot be measured or simulated.
    """
    if launched_world_size() is not None:
        raise InputError("growth starts worlds of its own, of 1, 2, 3, ... ranks: run it without a launcher")
    if device not in (None, "cpu"):
        raise InputError(f"growth is measured over gloo on the CPU, got device {device!r}")
    if largest is not None:
        if not 2 <= largest <= LARGEST:
            raise InputError(f"simulate needs 2 to {LARGEST} ranks, got {largest}")
        parameters.check()
        if dist.is_initialized():  # told now, not after the measuring
            raise InputError("simulate needs a process group of its own, and this process has one: destroy it first")
        if parameters.complete:
            return 0
    elif parameters != Parameters():
        raise InputError("latency, per-message cost and bandwidth are the simulation's: ask for --simulate N as well")
    least = 2 if largest is None else 3
    world_size = DEFAULT_LARGEST_WORLD if ranks is None else ranks
    if world_size < least:
        why = "" if largest is None else ", for it is fitted to worlds of 2 and 3"
        what = "growth" if largest is None else "simulate"
        raise InputError(f"{what} needs at least {least} ranks{why}, got {world_size}: ask for --ranks {least}")
    return world_size


def run_growth(
    settings: Settings,
    parameters: Parameters,
    quick: bool,
    command: str,
    progress: ProgressFactory,
    keep: Keep = discard,
) -> Benchmark:
    """Measures worlds of up to ``settings.world_size`` ranks, none if 0, and simulates ``settings.simulate``.

    ``keep`` is called with what was measured before that is simulated.
    """
    started = time.perf_counter()
    growth: Growth | None = None
    if settings.world_size:
        with ranks_for(settings.world_size, TIMEOUT_S) as on_ranks:
            growth = on_ranks(_measure_on_rank, settings, quick, progress)
    with torch_threads(1):
        benchmark = Benchmark(
            settings=settings,
            **provenance(hardware_of(CPU, "gloo" if growth is not None else "fake")),
            command=command,
            rows=(),
            model=None,
            summary=(),
            growth=growth,
            wall_seconds=time.perf_counter() - started,
        )
        if growth is not None:
            keep(benchmark)
        simulation = _simulation(settings, parameters, growth, quick, progress)
    return replace(benchmark, simulation=simulation, wall_seconds=time.perf_counter() - started)


def _simulation(
    settings: Settings, parameters: Parameters, growth: Growth | None, quick: bool, progress: ProgressFactory
) -> Simulation | None:
    if settings.simulate is None:
        return None
    with progress(1) as tell:
        tell("host: torch's fake process group")
        fitted_to, left_out = measure_host(settings.repetitions, quick)
    return simulate(settings.simulate, parameters, growth, fitted_to, left_out)


def _measure_on_rank(ranks: Ranks, settings: Settings, quick: bool, progress: ProgressFactory) -> Growth:
    with (progress if ranks.rank == 0 else silent)(GROWTH_STAGES) as tell:
        return measure_growth(ranks, settings.repetitions, settings.block_seconds, quick, tell)
