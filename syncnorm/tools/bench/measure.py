"""Timing of contenders in turns, so that what slows the machine for a while slows all of them."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist

from syncnorm.tools.bench.statistics import rotated
from syncnorm.tools.common.ranks import Ranks

Step = Callable[[], None]

WARM_UP = 3
MAX_STEPS = 1000


def interleaved(
    steps: Mapping[str, Step],
    ranks: Ranks,
    repetitions: int,
    steps_per_block: int,
    before: Mapping[str, Step] | None = None,
) -> dict[str, tuple[float, ...]]:
    """Seconds a step of each contender, by repetition: the slowest rank's.

    In each repetition every contender runs one block of ``steps_per_block`` steps, in an order that rotates.

    Args:
        steps: by name, what to time; the same names in the same order on all ranks. Warmed up by the caller.
        ranks: this process among the others.
        repetitions: blocks of each contender.
        steps_per_block: the same on all ranks.
        before: by name, what to do before each block, untimed: a step, where the caches and the memory that the
            one before left behind would count.

    Collective: all ranks; a barrier before each block, one all_reduce at the end.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    with _without_garbage_collection():
        for repetition in range(repetitions):
            for name in rotated(list(steps), repetition):
                if before is not None:
                    before[name]()
                ranks.wait()
                seconds[name].append(_block(steps[name], steps_per_block, ranks.device))
    # Afterwards, not between the blocks, whose caches and sockets are the contenders'.
    slowest = torch.tensor(list(seconds.values()), dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX, group=ranks.control)
    return {name: tuple(times) for name, times in zip(seconds, slowest.tolist(), strict=True)}


def warm_up(steps: Mapping[str, Step]) -> None:
    """Runs each contender a few times: allocators, connections and lazy imports settle. Collective: all ranks."""
    for step in steps.values():
        for _ in range(WARM_UP):
            step()


def block_length(seconds: float, block_seconds: float) -> int:
    """Steps that fill ``block_seconds`` if one takes ``seconds``, at least one.

    Example:
        >>> block_length(0.003, 0.02)
        7
    """
    return min(MAX_STEPS, max(1, round(block_seconds / seconds)))


def _block(step: Step, count: int, device: torch.device) -> float:
    if device.type == "cuda":
        return _block_on_gpu(step, count)
    started = time.perf_counter()
    for _ in range(count):
        step()
    return (time.perf_counter() - started) / count


def _block_on_gpu(step: Step, count: int) -> float:
    # Events, so that the GPU's clock tells what the GPU did; gaps in which it waits for launches count.
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    start.record()
    for _ in range(count):
        step()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / count


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
