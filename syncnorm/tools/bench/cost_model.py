"""The cost of synchronization in worlds too large to measure: arithmetic on a few parameters, without measuring.

W = number of ranks, C = channels. A step of a layer is a forward and a backward: two exchanges over gloo. Times are
seconds. Layers run one after the other, so the cost of a model is their sum. ``cluster_model`` is about GPUs.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from syncnorm.comm.frames import capacity_for

_FP32_BYTES = 4
# (W, C) -> seconds per step of a layer that a single rank would not spend.
LayerCost = Callable[[int, int], float]
# W -> seconds per step of some layers, likewise.
StepCost = Callable[[int], float]


@dataclass(frozen=True)
class Network:
    """Connections over which each rank sends its frame to every other rank, as gloo's alltoall does.

    Attributes:
        latency: seconds per exchange, independent of its size.
        per_message: seconds per other rank.
        per_byte: seconds per byte of a frame sent to one other rank, 1 / bandwidth.
    """

    latency: float
    per_message: float
    per_byte: float

    def exchange(self, world_size: int, num_bytes: int) -> float:
        """Seconds for frames of ``num_bytes`` from each rank to every other rank."""
        if world_size == 1:
            return 0.0
        return self.latency + (world_size - 1) * (self.per_message + num_bytes * self.per_byte)


@dataclass(frozen=True)
class Host:
    """A rank's own work for the step of a layer on a tiny input, including merging the rows of all ranks.

    Attributes:
        base: seconds for kernel launches and Python.
        per_channel: seconds per channel of the input.
        per_row: seconds per rank whose statistics are merged.
        per_value: seconds per channel of such a row.
    """

    base: float
    per_channel: float
    per_row: float
    per_value: float

    def own(self, channels: int) -> float:
        """Seconds that do not depend on the world size."""
        return self.base + self.per_channel * channels

    def merging(self, world_size: int, channels: int) -> float:
        """Seconds for merging, which grow with the world size; 0 in a world of one."""
        return 0.0 if world_size == 1 else world_size * (self.per_row + self.per_value * channels)


def frame_bytes(channels: int) -> int:
    """Size of a frame of a layer with fp32 statistics, forward or backward: a header and two vectors."""
    return capacity_for(2 * channels * _FP32_BYTES)


def bytes_received(world_size: int, channels: int) -> int:
    """Bytes that each rank receives in a step of a layer over gloo."""
    return 2 * (world_size - 1) * frame_bytes(channels)


def over_gloo(network: Network, host: Host) -> LayerCost:
    """The two exchanges of a layer, and merging the received rows."""
    return lambda world_size, channels: (
        2 * network.exchange(world_size, frame_bytes(channels)) + host.merging(world_size, channels)
    )


def flat(layer: LayerCost, channels: Iterable[int]) -> StepCost:
    """The cost of layers of these widths if all W ranks are one group. Caches its results."""
    widths = Counter(channels)
    return lru_cache(maxsize=None)(lambda world_size: sum(n * layer(world_size, c) for c, n in widths.items()))


def two_level(step: StepCost, world_size: int) -> tuple[int, float] | None:
    """The best g for a gather among g ranks followed by one among W / g, and its seconds.

    The statistics are exact, because Chan's formula can merge statistics that are already merged. g and W / g cost
    the same, so the smaller one is g. None if W is prime: then there is only the flat arrangement.

    Args:
        step: cost of the flat arrangement.
        world_size: W.
    """
    candidates = itertools.takewhile(lambda g: g * g <= world_size, itertools.count(2))
    splits = [(step(g) + step(world_size // g), g) for g in candidates if world_size % g == 0]
    if not splits:
        return None
    seconds, group_size = min(splits)
    return group_size, seconds


def two_level_pays_from(step: StepCost, largest: int) -> int | None:
    """The smallest W from which on, up to ``largest``, two levels cost less than one for every W that can be split.

    For a cost of ``latency + (W - 1) * m`` and W a square, that is above ``(1 + sqrt(latency / m))**2``; it is larger
    if other W count too, which split less evenly.
    """
    found = None
    for world_size in range(largest, 3, -1):
        split = two_level(step, world_size)
        if split is None:
            continue
        if split[1] >= step(world_size):
            break
        found = world_size
    return found


def worlds_up_to(largest: int) -> tuple[int, ...]:
    """2, 4, 8, ... and ``largest``.

    Example:
        >>> worlds_up_to(12)
        (2, 4, 8, 12)
    """
    powers = itertools.takewhile(lambda w: w < largest, (2**n for n in itertools.count(1)))
    return (*powers, largest)


def fit_network(
    samples: Sequence[tuple[int, int, float]],
    latency: float | None = None,
    per_message: float | None = None,
    per_byte: float | None = None,
) -> Network:
    """The network that fits ``samples`` best.

    Args:
        samples: (W, bytes of a frame, seconds) of exchanges.
        latency: of `Network` if given; None is fitted. Likewise the others.
        per_message: see ``latency``.
        per_byte: see ``latency``.
    """
    columns = [[1.0, float(w - 1), float((w - 1) * size)] for w, size, _ in samples]
    given = [latency, per_message, per_byte]
    return Network(*_least_squares(columns, [seconds for *_, seconds in samples], given))


def fit_host(samples: Sequence[tuple[int, int, float]]) -> Host:
    """The host that fits ``samples``, (W, C, seconds), best."""
    columns = [[1.0, float(c), float(w), float(w * c)] for w, c, _ in samples]
    return Host(*_least_squares(columns, [seconds for *_, seconds in samples], [None] * 4))


def _least_squares(
    columns: Sequence[Sequence[float]], target: Sequence[float], given: Sequence[float | None]
) -> list[float]:
    """The non-negative coefficients with the smallest sum of squared relative errors.

    Errors are relative because the times span decades. There are few coefficients, so every subset of those that are
    not zero is tried, which is certain to find the constrained optimum.
    """
    relative = torch.tensor(target, dtype=torch.float64).reciprocal().unsqueeze(1)
    a = torch.tensor(columns, dtype=torch.float64).view(-1, len(given)) * relative
    fixed = [0.0 if value is None else value for value in given]
    b = torch.ones_like(relative) - a @ torch.tensor(fixed, dtype=torch.float64).unsqueeze(1)
    free = [i for i, value in enumerate(given) if value is None]
    best, best_error = fixed, float(b.square().sum())
    for used in itertools.chain.from_iterable(itertools.combinations(free, n) for n in range(1, len(free) + 1)):
        part = a[:, list(used)]
        scale = part.norm(dim=0)  # the columns of bytes and of ones differ by many decades
        found = torch.linalg.lstsq(part / scale, b, driver="gelsd").solution[:, 0] / scale
        error = float((part @ found.unsqueeze(1) - b).square().sum())
        if error < best_error and bool((found >= 0).all()):
            best_error = error
            best = [*fixed]
            for index, value in zip(used, found.tolist(), strict=True):
                best[index] = value
    return best
