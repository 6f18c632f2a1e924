"""``run_scaling``: how the cost grows with ranks, channels and layers, in worlds of 1, 2, 3, ... ranks in turn.

On request a cost model, fitted to these worlds, then predicts the cost in larger ones.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from syncnorm.comm import Call, Kind, TransportName, exchange_of, set_transport, transport_of
from syncnorm.comm.gather import gather_rows
from syncnorm.errors import InputError
from syncnorm.modules import SyncBatchNorm2d
from syncnorm.tools.bench.layers import LayerStep, make_inputs
from syncnorm.tools.bench.measure import WARM_UP, ContenderKey, Step, timed_in_blocks
from syncnorm.tools.bench.records import SCALING, Benchmark, BenchSettings
from syncnorm.tools.bench.runner import RunOptions, settings_for
from syncnorm.tools.bench.scaling_records import Cost, Scaling
from syncnorm.tools.bench.shapes import SCALING_PLACES, scaling_shape
from syncnorm.tools.bench.simulation import LARGEST, Parameters, measure_host, simulate
from syncnorm.tools.common.launcher import launched_world_size
from syncnorm.tools.common.progress import ProgressFactory, Tell, silent
from syncnorm.tools.common.provenance import command_line, cpu_count, hardware_of, provenance
from syncnorm.tools.common.ranks import Ranks, ranks_for, torch_threads
from syncnorm.tools.common.stats import median_ratio, quartiles

DEFAULT_LARGEST_WORLD = 4
CHANNELS = (16, 64, 256, 1024)
_STACKS = (1, 4, 16)
_STACK_CHANNELS = 64
_PAYLOAD_BYTES = (512, 2048, 8192, 32768, 65536)
_QUICK_CHANNELS, _QUICK_STACKS, _QUICK_PAYLOAD_BYTES = (16, 64), (1, 2), (512, 65536)
# Longer than in the layer benchmark: a block begins with ranks that wake up.
_BLOCK_SECONDS = 0.04
_STAGES = 2  # labels that `_measure_worlds` reports
# Only ends a run whose ranks hang.
_TIMEOUT_S = 3600.0


def run_scaling(
    options: RunOptions, *, simulated_ranks: int | None = None, parameters: Parameters | None = None
) -> Benchmark:
    """Times layers, stacks of layers and bare exchanges in worlds of up to ``options.ranks`` started ranks.

    Args:
        options: see `RunOptions`; 4 ranks by default. ``keep`` is called with the measured worlds before the
            simulation.
        simulated_ranks: also predict the cost in worlds of up to this number of ranks, with the cost model.
        parameters: of the network of that model; those that are None are fitted to the measured worlds. If all are
            given, no world is measured.

    Returns:
        The record.

    Raises:
        InputError: an invalid argument; raised before anything starts.
    """
    started, command = time.perf_counter(), command_line()
    settings = settings_for(
        SCALING,
        options,
        world_size=_largest_world(options.ranks, simulated_ranks, parameters),
        device="cpu",
        dtypes=("fp32",),
        block_seconds=_BLOCK_SECONDS,
        simulate=simulated_ranks,
    )
    scaling: Scaling | None = None
    if settings.world_size:
        with ranks_for(settings.world_size, _TIMEOUT_S) as on_ranks:
            scaling = on_ranks(_measure_on_rank, settings, options.quick, options.progress)
    with torch_threads(1):
        benchmark = Benchmark(
            settings=settings,
            **provenance(hardware_of(torch.device("cpu"), "gloo" if scaling is not None else "fake")),
            command=command,
            rows=(),
            model=None,
            summary=(),
            growth=scaling,
            wall_seconds=time.perf_counter() - started,
        )
        if scaling is not None:
            options.keep(benchmark)
        if simulated_ranks is None:
            return benchmark
        with options.progress(1) as tell:
            tell("host: torch's fake process group")
            fitted_to, left_out = measure_host(settings.repetitions, options.quick)
        simulation = simulate(simulated_ranks, parameters or Parameters(), scaling, fitted_to, left_out)
    return replace(benchmark, simulation=simulation, wall_seconds=time.perf_counter() - started)


def _largest_world(ranks: int | None, simulated_ranks: int | None, parameters: Parameters | None) -> int:
    """The number of ranks of the largest measured world; 0 if no parameter of the network has to be measured."""
    if launched_world_size() is not None:
        raise InputError("scaling starts its own worlds of 1, 2, 3, ... ranks: run it without a launcher")
    least, name, why = 2, "scaling", ""
    if simulated_ranks is not None:
        least, name, why = 3, "simulate", ", because the cost model is fitted to worlds of 2 and 3"
        if not 2 <= simulated_ranks <= LARGEST:
            raise InputError(f"simulate needs 2 to {LARGEST} ranks, got {simulated_ranks}")
        parameters = parameters or Parameters()
        parameters.check()
        if dist.is_initialized():  # checked here, not only after the measurement
            raise InputError("simulate needs a process group of its own, and this process has one: destroy it first")
        if parameters.complete:
            return 0
    elif parameters not in (None, Parameters()):
        raise InputError("latency, per-message cost and bandwidth belong to the simulation: add --simulate N")
    world_size = DEFAULT_LARGEST_WORLD if ranks is None else ranks
    if world_size < least:
        raise InputError(f"{name} needs at least {least} ranks{why}, got {world_size}: use --ranks {least}")
    return world_size


def measured_worlds(largest: int) -> tuple[int, ...]:
    """1 to 4, then powers of two, and ``largest``.

    Example:
        >>> measured_worlds(12)
        (1, 2, 3, 4, 8, 12)
    """
    worlds = [w for w in (1, 2, 3, *(2**n for n in range(2, 16))) if w < largest]
    return (*worlds, largest)


def _measure_on_rank(ranks: Ranks, settings: BenchSettings, quick: bool, progress: ProgressFactory) -> Scaling:
    with (progress if ranks.rank == 0 else silent)(_STAGES) as tell:
        return _measure_worlds(ranks, settings, quick, tell)


def _measure_worlds(ranks: Ranks, settings: BenchSettings, quick: bool, tell: Tell) -> Scaling:
    """Times the contenders in worlds of the first 1, 2, 3, ... ranks, while the other ranks wait.

    Collective: all ranks.
    """
    worlds = measured_worlds(ranks.world_size)
    tell("scaling: connecting")
    # The cost model is one of connections, as between hosts.
    steps, before = _contenders(worlds, ranks, quick, None if settings.simulate is None else "gloo")
    tell(f"scaling: worlds of {', '.join(map(str, worlds))} in turn")
    timed = timed_in_blocks(steps, ranks, settings.repetitions, settings.block_seconds, before)

    def costs(wanted: str) -> tuple[Cost, ...]:
        found = []
        for (kind, world_size, size), (count, seconds) in timed.items():
            if kind == wanted:
                p25, median, p75 = quartiles(seconds)
                ratio = median_ratio(seconds, timed[kind, 2, size][1])
                oversubscribed = world_size > cpu_count()
                found.append(Cost(world_size, size, oversubscribed, count, seconds, median, p25, p75, ratio))
        return tuple(found)

    measured = (costs("layer"), costs("stack"), costs("exchange"))
    groups = [step.group for step in steps.values() if isinstance(step, _ExchangeStep)]  # the largest is the last
    transport = transport_of(groups[-1]) if groups else ""
    return Scaling(worlds, cpu_count(), SCALING_PLACES, _STACK_CHANNELS, *measured, transport)


def _contenders(
    worlds: Sequence[int], ranks: Ranks, quick: bool, transport: TransportName | None
) -> tuple[dict[ContenderKey, Step], dict[ContenderKey, Step]]:
    """What to time, and what to run before each block of it."""
    channels, stacks, payloads = (
        (_QUICK_CHANNELS, _QUICK_STACKS, _QUICK_PAYLOAD_BYTES) if quick else (CHANNELS, _STACKS, _PAYLOAD_BYTES)
    )
    steps: dict[ContenderKey, Step] = {}
    before: dict[ContenderKey, Step] = {}
    for world_size in worlds:
        # One group per world and not per contender: gloo checks idle connections 100 times a second.
        group = dist.new_group(list(range(world_size)))
        if ranks.rank < world_size:
            set_transport(group, transport)
        sizes = {"layer": channels, "stack": stacks, "exchange": payloads if world_size > 1 else ()}
        keys: list[ContenderKey] = [(kind, world_size, size) for kind, each in sizes.items() for size in each]
        for key in keys:
            if ranks.rank < world_size:
                steps[key] = _step(key, group, ranks)
                before[key] = _WakeUp(_ExchangeStep(group, 8, f"before {key}"), steps[key])
            else:
                steps[key] = before[key] = _idle
    return steps, before


def _step(key: ContenderKey, group: dist.ProcessGroup, ranks: Ranks) -> Step:
    kind, _, size = key
    if kind == "exchange":
        return _ExchangeStep(group, size)
    width, count = (size, 1) if kind == "layer" else (_STACK_CHANNELS, size)
    layers = nn.Sequential(*(SyncBatchNorm2d(width, process_group=group) for _ in range(count)))
    return LayerStep(layers, make_inputs(scaling_shape(width), "contiguous", "fp32", ranks.device, seed=ranks.rank))


@dataclass
class _ExchangeStep:
    """One exchange of a payload of ``num_bytes``, or a native gather of it where the layer exchanges no frames.

    Collective: the ranks of ``group``.
    """

    group: dist.ProcessGroup
    num_bytes: int
    name: str = "the bare exchange"
    _payload: Tensor = field(init=False)
    _calls: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._payload = torch.ones(self.num_bytes // 4)

    def __call__(self) -> None:
        exchange = exchange_of(self.group, self._payload.device)
        if exchange is None:
            gather_rows(self._payload, self.group, self.name)
            return
        self._calls += 1
        exchange(Call(Kind.FORWARD, self.name, self._calls, self._payload.numel()), [self._payload])


@dataclass(frozen=True)
class _WakeUp:
    """Wakes the ranks up, and makes contenders independent of the size of each other's frames.

    The size of a frame is predicted from what followed the previous exchange the last time. With a small exchange
    before every contender, the prediction does not depend on the order of the contenders.
    """

    exchange: _ExchangeStep
    step: Step

    def __call__(self) -> None:
        if self.exchange.group.size() > 1:
            self.exchange()
        for _ in range(WARM_UP):
            self.step()


def _idle() -> None:
    """For ranks outside the world that is being timed: they wait for the next block without using a core."""
