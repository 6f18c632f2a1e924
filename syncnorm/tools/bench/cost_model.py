"""What synchronising costs in worlds that nobody has at hand: arithmetic on a few parameters, nothing measured.

W = ranks, C = channels. A layer's step is a forward and a backward: two exchanges over gloo, an all_gather and an
all_reduce over NCCL. Times are seconds; layers come one after the other, so a model costs their sum.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from syncnorm.comm.frames import capacity_for

FP32 = 4
# (W, C) -> seconds of a layer's step that a lone rank would not spend.
LayerCost = Callable[[int, int], float]


@dataclass(frozen=True)
class Network:
    """Connections over which each rank sends its frame to each other one, as gloo's alltoall does.

    Attributes:
        latency: of an exchange, whatever its size.
        per_message: for each other rank.
        per_byte: of a frame sent to one other rank: 1 / bandwidth.
    """

    latency: float
    per_message: float
    per_byte: float

    def exchange(self, world_size: int, num_bytes: int) -> float:
        """Frames of ``num_bytes``, from each rank to each other one."""
        if world_size == 1:
            return 0.0
        return self.latency + (world_size - 1) * (self.per_message + num_bytes * self.per_byte)


@dataclass(frozen=True)
class Ring:
    """NCCL's rings, over which each rank sends to the next.

    Attributes:
        launch: of a collective, whatever its size.
        hop: from a rank to the next.
        per_byte: 1 / bandwidth.
    """

    launch: float
    hop: float
    per_byte: float

    def all_gather(self, world_size: int, num_bytes: int) -> float:
        """``num_bytes`` a rank, passed on W - 1 times."""
        if world_size == 1:
            return 0.0
        return self.launch + (world_size - 1) * (self.hop + num_bytes * self.per_byte)

    def all_reduce(self, world_size: int, num_bytes: int) -> float:
        """Twice W - 1 hops, each of one of the W parts of ``num_bytes``."""
        if world_size == 1:
            return 0.0
        return self.launch + 2 * (world_size - 1) * (self.hop + num_bytes / world_size * self.per_byte)


@dataclass(frozen=True)
class Host:
    """A rank's own work for a layer's step on a tiny input: what it does in any world, and the rows that it merges.

    Attributes:
        base: launches and Python.
        per_channel: of the input.
        per_row: of a rank whose statistics are merged.
        per_value: of a channel of such a row.
    """

    base: float
    per_channel: float
    per_row: float
    per_value: float

    def own(self, channels: int) -> float:
        """What does not grow with the world."""
        return self.base + self.per_channel * channels

    def merging(self, world_size: int, channels: int) -> float:
        """What grows with the world: none of it where there is nothing to merge."""
        return 0.0 if world_size == 1 else world_size * (self.per_row + self.per_value * channels)


def frame_bytes(channels: int) -> int:
    """Of a frame of a layer with fp32 statistics, forward and backward alike: two vectors behind a header."""
    return capacity_for(2 * channels * FP32)


def bytes_received(world_size: int, channels: int) -> int:
    """By each rank in a layer's step over gloo."""
    return 2 * (world_size - 1) * frame_bytes(channels)


def over_gloo(network: Network, host: Host) -> LayerCost:
    """The layer's two exchanges, and merging what they bring."""
    return lambda world_size, channels: (
        2 * network.exchange(world_size, frame_bytes(channels)) + host.merging(world_size, channels)
    )


def over_nccl(ring: Ring) -> LayerCost:
    """The layer's two collectives alone: what a GPU takes to merge is not modelled.

    Each carries one number beside those of the channels by which ranks that disagree are found; the gather the
    count as well.
    """

    def seconds(world_size: int, channels: int) -> float:
        gathered, summed = FP32 * (2 * channels + 2), FP32 * (2 * channels + 1)
        return ring.all_gather(world_size, gathered) + ring.all_reduce(world_size, summed)

    return seconds


def flat(layer: LayerCost, channels: Iterable[int]) -> Callable[[int], float]:
    """W -> seconds for layers of these widths, all W ranks in one group. Remembers what it has computed."""
    widths = Counter(channels)
    return lru_cache(maxsize=None)(lambda world_size: sum(n * layer(world_size, c) for c, n in widths.items()))


def two_level(step: Callable[[int], float], world_size: int) -> tuple[int, float] | None:
    """The best g for a gather among g ranks and then one among W / g, and its seconds.

    Of exact statistics, for Chan's formula merges merged ones as well. g and W / g cost the same, so g is the
    smaller. None where W is prime: there is only the flat arrangement.

    Args:
        step: W -> seconds of the flat arrangement.
        world_size: W.
    """
    candidates = itertools.takewhile(lambda g: g * g <= world_size, itertools.count(2))
    splits = [(step(g) + step(world_size // g), g) for g in candidates if world_size % g == 0]
    if not splits:
        return None
    seconds, group_size = min(splits)
    return group_size, seconds


def pays_from(step: Callable[[int], float], largest: int) -> int | None:
    """The smallest W from which on, up to ``largest``, two levels cost less than one wherever W can be split.

    With a cost of ``latency + (W - 1) * m`` that is, among the squares, beyond ``(1 + sqrt(latency / m))**2``, and
    later where other sizes count, which split less well.
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
    """The network that explains ``samples`` best, with the parameters that are given.

    Args:
        samples: (W, bytes of a frame, seconds) of exchanges.
        latency: given, or fitted where None; likewise the others.
        per_message: see `Network`.
        per_byte: see `Network`.
    """
    columns = [[1.0, float(w - 1), float((w - 1) * size)] for w, size, _ in samples]
    given = [latency, per_message, per_byte]
    return Network(*_least_squares(columns, [seconds for *_, seconds in samples], given))


def fit_host(samples: Sequence[tuple[int, int, float]]) -> Host:
    """The work that explains ``samples``, (W, C, seconds), best."""
    columns = [[1.0, float(c), float(w), float(w * c)] for w, c, _ in samples]
    return Host(*_least_squares(columns, [seconds for *_, seconds in samples], [None] * 4))


def _least_squares(
    columns: Sequence[Sequence[float]], target: Sequence[float], given: Sequence[float | None]
) -> list[float]:
    """Coefficients, none negative, for the least sum of squared relative errors.

    A time is positive and spans decades, so errors count in relation to it. Few coefficients: all sets of those that
    are not zero are tried, which finds the constrained optimum for sure.
    """
    relative = torch.tensor(target, dtype=torch.float64).reciprocal().unsqueeze(1)
    a = torch.tensor(columns, dtype=torch.float64).view(-1, len(given)) * relative
    fixed = [0.0 if value is None else value for value in given]
    b = torch.ones_like(relative) - a @ torch.tensor(fixed, dtype=torch.float64).unsqueeze(1)
    free = [i for i, value in enumerate(given) if value is None]
    best, best_error = fixed, float(b.square().sum())
    for used in itertools.chain.from_iterable(itertools.combinations(free, n) for n in range(1, len(free) + 1)):
        part = a[:, list(used)]
        scale = part.norm(dim=0)  # bytes against ones: columns many decades apart
        found = torch.linalg.lstsq(part / scale, b, driver="gelsd").solution[:, 0] / scale
        error = float((part @ found.unsqueeze(1) - b).square().sum())
        if error < best_error and bool((found >= 0).all()):
            best_error = error
            best = [*fixed]
            for index, value in zip(used, found.tolist(), strict=True):
                best[index] = value
    return best
