"""Timing contenders in turn, so that whatever slows the machine down for a while slows all of them down."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

from syncnorm.tools.bench.records import Timing
from syncnorm.tools.common.ranks import Ranks
from syncnorm.tools.common.stats import median_ratio, quartiles
from syncnorm.tools.common.timing import rotated

T = TypeVar("T")
Step = Callable[[], None]
# Kind of contender, number of ranks, size.
ContenderKey = tuple[str, int, int]

WARM_UP = 3
MAX_STEPS = 1000


def interleaved(
    steps: Mapping[str, Step],
    ranks: Ranks,
    repetitions: int,
    steps_per_block: int,
    before: Mapping[str, Step] | None = None,
) -> dict[str, tuple[float, ...]]:
    """Seconds per step of each contender on the slowest rank, by repetition.

    In each repetition every contender runs one block of ``steps_per_block`` steps, in an order that rotates.

    Args:
        steps: name -> the step to time; the same names in the same order on all ranks, already warmed up.
        ranks: this process and its group.
        repetitions: blocks per contender.
        steps_per_block: the same on all ranks.
        before: name -> what to run, untimed, before each block: for example a step, if caches and memory that the
            previous contender left behind would count otherwise.

    Collective: all ranks; a barrier before each block, one all_reduce at the end.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    with without_garbage_collection():
        for repetition in range(repetitions):
            for name in rotated(list(steps), repetition):
                if before is not None:
                    before[name]()
                ranks.wait()
                seconds[name].append(_block(steps[name], steps_per_block, ranks.device))
    # At the end and not between the blocks, where it would disturb the caches and sockets of the contenders.
    slowest = torch.tensor(list(seconds.values()), dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX, group=ranks.control)
    return {name: tuple(times) for name, times in zip(seconds, slowest.tolist(), strict=True)}


def warm_up(steps: Mapping[str, Step]) -> None:
    """Runs each contender a few times: allocators, connections, lazy imports. Collective: all ranks."""
    for step in steps.values():
        for _ in range(WARM_UP):
            step()


def block_length(seconds: float, block_seconds: float) -> int:
    """Number of steps of ``seconds`` each that fill ``block_seconds``; at least one.

    Example:
        >>> block_length(0.003, 0.02)
        7
    """
    return min(MAX_STEPS, max(1, round(block_seconds / seconds)))


def timed_in_blocks(
    steps: Mapping[ContenderKey, Step],
    ranks: Ranks,
    repetitions: int,
    block_seconds: float,
    before: Mapping[ContenderKey, Step] | None = None,
) -> dict[ContenderKey, tuple[int, tuple[float, ...]]]:
    """Times contenders whose steps differ by orders of magnitude, each with a block length of its own.

    Returns:
        key -> (steps per block, seconds per step by repetition).

    Collective: all ranks.
    """
    named, before_named = (
        {"/".join(map(str, key)): step for key, step in each.items()} for each in (steps, before or {})
    )
    # Times of the slowest rank, so that all ranks compute the same counts; the faster of two, so that a hiccup does
    # not shorten the blocks.
    rough = interleaved(named, ranks, 2, WARM_UP, before_named or None)
    counts = {name: block_length(min(times), block_seconds) for name, times in rough.items()}
    blocks = {name: _Repeated(step, counts[name]) for name, step in named.items()}
    seconds = interleaved(blocks, ranks, repetitions, 1, before_named or None)
    return {
        key: (counts[name], tuple(t / counts[name] for t in seconds[name]))
        for key, name in zip(steps, named, strict=True)
    }


def timings(
    seconds: Mapping[str, Sequence[float]], baselines: Sequence[str], not_run: Mapping[str, str]
) -> tuple[Timing, ...]:
    """A `Timing` per contender, those that ran first, with ratios to the baselines in the same repetitions."""
    ran = []
    for name, times in seconds.items():
        p25, middle, p75 = quartiles(times)
        ratios = {b: median_ratio(times, seconds[b]) for b in baselines if b in seconds and b != name}
        ran.append(Timing(name, None, tuple(times), middle, p25, p75, ratios))
    return (*ran, *(Timing(name, reason) for name, reason in not_run.items()))


@dataclass(frozen=True)
class _Repeated:
    step: Step
    count: int

    def __call__(self) -> None:
        for _ in range(self.count):
            self.step()


def _block(step: Step, count: int, device: torch.device) -> float:
    if device.type == "cuda":
        return _block_on_gpu(step, count)
    started = time.perf_counter()
    for _ in range(count):
        step()
    return (time.perf_counter() - started) / count


def _block_on_gpu(step: Step, count: int) -> float:
    # Events measure by the GPU's own clock, including the gaps in which it waits for launches.
    start, end = (
        torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        for _ in range(2)
    )
    torch.cuda.synchronize()
    start.record()
    for _ in range(count):
        step()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / count


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Collects garbage at once, and not while the block runs."""
    """Collects garbage at once, and not while the block runs."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
