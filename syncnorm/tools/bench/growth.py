"""How the cost grows with ranks, channels and layers: worlds of 1, 2, 3, ... of the same ranks, in turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from syncnorm.comm import Call, Kind, exchange_of
from syncnorm.modules import SyncBatchNorm2d
from syncnorm.tools.bench.growth_records import Cost, Growth
from syncnorm.tools.bench.layers import LayerStep, make_inputs
from syncnorm.tools.bench.measure import WARM_UP, Step, block_length, interleaved
from syncnorm.tools.common.provenance import cpu_count
from syncnorm.tools.common.ranks import Ranks
from syncnorm.tools.common.stats import median_ratio, quartiles

GROWTH_STAGES = 2  # what `measure_growth` tells its watcher
BATCH, SIDE = 4, 4  # of images so small that communication is nearly all
CHANNELS = (16, 64, 256, 1024)
STACKS = (1, 4, 16)
STACK_CHANNELS = 64
PAYLOADS = (512, 2048, 8192, 32768, 65536)
QUICK_CHANNELS, QUICK_STACKS, QUICK_PAYLOADS = (16, 64), (1, 2), (512, 65536)

# Kind of contender, ranks, size.
Key = tuple[str, int, int]


@dataclass
class ExchangeStep:
    """One exchange of a payload of ``num_bytes``. Collective: the ranks of ``group``."""

    group: dist.ProcessGroup
    num_bytes: int
    name: str = "the bare exchange"
    _vector: Tensor = field(init=False)
    _calls: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._vector = torch.ones(self.num_bytes // 4)

    def __call__(self) -> None:
        """Brings the others' payloads."""
        self._calls += 1
        call = Call(Kind.FORWARD, self.name, self._calls, self._vector.numel())
        exchange = exchange_of(self.group, self._vector.device)
        assert exchange is not None, "a CPU group over gloo has one"
        exchange(call, [self._vector])


@dataclass(frozen=True)
class Repeated:
    """``step`` as often as fills a block. Blocks of one count would take minutes for some, or be noise for others."""

    step: Step
    count: int

    def __call__(self) -> None:
        """One block."""
        for _ in range(self.count):
            self.step()


def growing_worlds(largest: int) -> tuple[int, ...]:
    """1 to 4, then powers of two, and ``largest``.

    Example:
        >>> growing_worlds(12)
        (1, 2, 3, 4, 8, 12)
    """
    worlds = [w for w in (1, 2, 3, *(2**n for n in range(2, 16))) if w < largest]
    return (*worlds, largest)


def timed_in_blocks(
    steps: Mapping[Key, Step],
    ranks: Ranks,
    repetitions: int,
    block_seconds: float,
    before: Mapping[Key, Step] | None = None,
) -> dict[Key, tuple[int, tuple[float, ...]]]:
    """Steps a block, and seconds a step by repetition, of contenders whose steps differ by orders of magnitude.

    Collective: all ranks.
    """
    named, before_named = (
        {"/".join(map(str, key)): step for key, step in each.items()} for each in (steps, before or {})
    )
    # The slowest rank's, so all come to the same counts; the better of two, so that no hiccup shortens the blocks.
    rough = interleaved(named, ranks, 2, WARM_UP, before_named or None)
    counts = {name: block_length(min(times), block_seconds) for name, times in rough.items()}
    blocks = {name: Repeated(step, counts[name]) for name, step in named.items()}
    seconds = interleaved(blocks, ranks, repetitions, 1, before_named or None)
    return {
        key: (counts[name], tuple(t / counts[name] for t in seconds[name]))
        for key, name in zip(steps, named, strict=True)
    }


def measure_growth(
    ranks: Ranks, repetitions: int, block_seconds: float, quick: bool, tell: Callable[[str], None]
) -> Growth:
    """Times the contenders in worlds of the first 1, 2, 3, ... of these ranks; the others wait meanwhile.

    Collective: all ranks.
    """
    worlds = growing_worlds(ranks.world_size)
    tell("growth: connecting")
    steps, before = _contenders(worlds, ranks, quick)
    tell(f"growth: worlds of {', '.join(map(str, worlds))} in turns")
    timed = timed_in_blocks(steps, ranks, repetitions, block_seconds, before)

    def costs(kind: str) -> tuple[Cost, ...]:
        found = []
        for (what, world_size, size), (count, seconds) in timed.items():
            if what == kind:
                p25, median, p75 = quartiles(seconds)
                ratio = median_ratio(seconds, timed[kind, 2, size][1])
                over = world_size > cpu_count()
                found.append(Cost(world_size, size, over, count, seconds, median, p25, p75, ratio))
        return tuple(found)

    places = BATCH * SIDE**2
    return Growth(worlds, cpu_count(), places, STACK_CHANNELS, costs("layer"), costs("stack"), costs("exchange"))


def _contenders(worlds: Sequence[int], ranks: Ranks, quick: bool) -> tuple[dict[Key, Step], dict[Key, Step]]:
    """What to time, and what to do before each block of it."""
    channels, stacks, payloads = (
        (QUICK_CHANNELS, QUICK_STACKS, QUICK_PAYLOADS) if quick else (CHANNELS, STACKS, PAYLOADS)
    )
    steps: dict[Key, Step] = {}
    before: dict[Key, Step] = {}
    for world_size in worlds:
        # One group a world, for connections are not free while they idle: gloo looks after each 100 times a second.
        group = dist.new_group(list(range(world_size)))
        sizes = {"layer": channels, "stack": stacks, "exchange": payloads if world_size > 1 else ()}
        keys: list[Key] = [(what, world_size, size) for what, of_kind in sizes.items() for size in of_kind]
        for key in keys:
            if ranks.rank < world_size:
                steps[key] = _step(key, group, ranks)
                before[key] = _Before(ExchangeStep(group, 8, f"before {key}"), steps[key])
            else:
                steps[key] = before[key] = _idle
    return steps, before


def _step(key: Key, group: dist.ProcessGroup, ranks: Ranks) -> Step:
    what, _, size = key
    if what == "exchange":
        return ExchangeStep(group, size)
    width, count = (size, 1) if what == "layer" else (STACK_CHANNELS, size)
    layers = nn.Sequential(*(SyncBatchNorm2d(width, process_group=group) for _ in range(count)))
    shape = (BATCH, width, SIDE, SIDE)
    return LayerStep(layers, make_inputs(shape, "contiguous", "fp32", ranks.device, seed=ranks.rank))


@dataclass(frozen=True)
class _Before:
    """Wakes the ranks up; and has no contender pay for another's frames.

    An exchange's frames are as large as what once followed the exchange before it. A small one of its own before each
    contender is what follows the others.
    """

    exchange: ExchangeStep
    step: Step

    def __call__(self) -> None:
        if self.exchange.group.size() > 1:
            self.exchange()
        for _ in range(WARM_UP):
            self.step()


def _idle() -> None:
    """What ranks outside a world do while it is timed: they wait for the next block, without a core."""
