"""Timing contenders call by call, as a model calls its layers: after other work, with ranks that arrive one by one.

A rank that arrives early at a synchronized step waits for the others. That wait is not a cost of the step: it is the
same whatever the layer does, and a step without communication does not show it. So a step is timed **from the arrival
of the last rank until all ranks are done**, for every contender alike. What a contender itself adds is included: a
waiting rank that wakes up late, a message on its way, and work that a rank repeats.

Ranks are compared by their clocks, which are one clock if they run on one host. On several hosts a step counts as
long as on the rank that needed the least time, which is the one that waited least.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor

from syncnorm.tools.bench.measure import Step, without_garbage_collection
from syncnorm.tools.common.ranks import Ranks
from syncnorm.tools.common.timing import rotated

# What the other work reads, and as much again that it writes: the activations of a convolution, more than the caches
# of a core hold.
ACTIVATIONS_BYTES = 2**23
# Largest share of the other work that a rank skips. Ranks of a training job differ by more where data is loaded.
MAX_SKIPPED = 0.1


@dataclass(frozen=True)
class CallTimes:
    """Seconds per call of each contender, and how much later than the first rank the last one arrived.

    Attributes:
        seconds: by contender and turn.
        lateness: median over all calls; None if the ranks have no common clock.
    """

    seconds: dict[str, tuple[float, ...]]
    lateness: float | None


@dataclass
class OtherWork:
    """What a rank does before a call: reads `ACTIVATIONS_BYTES` and writes as much, which empties its caches.

    It skips up to `MAX_SKIPPED` of them, by rank and call, so that the ranks arrive at different times: up to 0.2 ms
    apart on a core that copies 8 GB/s, and by what the operating system adds.

    Args:
        rank: seeds the sizes, which are the same in every run.
    """

    rank: int
    _sizes: random.Random = field(init=False)
    _read: Tensor = field(init=False)
    _written: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self._sizes = random.Random(self.rank)
        self._read = torch.ones(ACTIVATIONS_BYTES // 4)
        self._written = torch.zeros_like(self._read)

    def __call__(self) -> None:
        """Works for about a millisecond."""
        size = round(self._read.numel() * (1 - MAX_SKIPPED * self._sizes.random()))
        torch.mul(self._read[:size], 0.5, out=self._written[:size])


def call_by_call(steps: Mapping[str, Step], ranks: Ranks, turns: int, before: Step | None = None) -> CallTimes:
    """Times single calls on the CPU; every contender runs once in each turn, in an order that rotates.

    Args:
        steps: name -> the step to time; the same names in the same order on all ranks, already warmed up.
        ranks: this process and its group.
        turns: calls per contender.
        before: what this rank does before each call, untimed. Nothing else lines up the ranks.

    Collective: all ranks; barriers at the start, all_reduces at the end.
    """
    share_clock = one_clock(ranks)
    clock = time.perf_counter
    starts: dict[str, list[float]] = {name: [] for name in steps}
    ends: dict[str, list[float]] = {name: [] for name in steps}
    ranks.wait()
    with without_garbage_collection():
        for turn in range(turns):
            for name in rotated(list(steps), turn):
                step = steps[name]
                if before is not None:
                    before()
                started = clock()
                step()
                ended = clock()
                starts[name].append(started)
                ends[name].append(ended)
    began, done = (torch.tensor(list(each.values()), dtype=torch.float64) for each in (starts, ends))
    lateness = None
    if share_clock:
        last_arrival = _over_ranks(began, dist.ReduceOp.MAX, ranks)
        lateness = median((last_arrival - _over_ranks(began, dist.ReduceOp.MIN, ranks)).flatten().tolist())
        seconds = _over_ranks(done, dist.ReduceOp.MAX, ranks) - last_arrival
    else:
        seconds = _over_ranks(done - began, dist.ReduceOp.MIN, ranks)
    return CallTimes({name: tuple(each) for name, each in zip(steps, seconds.tolist(), strict=True)}, lateness)


def turns_to_fill(seconds: float, seconds_per_turn: float, least: int) -> int:
    """Number of turns that fill ``seconds``, and not fewer than ``least``.

    Example:
        >>> turns_to_fill(1.0, 0.03, least=15), turns_to_fill(1.0, 0.2, least=15)
        (33, 15)
    """
    return max(least, round(seconds / seconds_per_turn))


def one_clock(ranks: Ranks) -> bool:
    """Whether the clocks of all ranks are one: by it, no rank leaves a barrier before all have reached it.

    Clocks of different hosts count from when each host started, and fail by far more than a barrier takes.

    Collective: all ranks.
    """
    ranks.wait()
    reached = time.perf_counter()
    ranks.wait()
    left = time.perf_counter()
    # One all_reduce: the earliest that a rank left, and the negative of the latest that one reached it.
    earliest_left, latest_reached = _over_ranks(
        torch.tensor([left, -reached], dtype=torch.float64), dist.ReduceOp.MIN, ranks
    ).tolist()
    return bool(earliest_left >= -latest_reached)


def _over_ranks(values: Tensor, operation: dist.ReduceOp.RedOpType, ranks: Ranks) -> Tensor:
    result = values.clone()
    dist.all_reduce(result, operation, group=ranks.control)
    return result
