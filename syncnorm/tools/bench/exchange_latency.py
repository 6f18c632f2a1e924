"""The exchange benchmark: how long the gather of a layer takes on small statistics, in three situations."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median, quantiles

import torch
import torch.distributed as dist

from syncnorm.comm import Kind, exchange_of, gather_moments, native_call
from syncnorm.tools.bench.calls import OtherWork, call_by_call
from syncnorm.tools.bench.measure import Step, warm_up
from syncnorm.tools.bench.records import BenchSettings, ExchangeLatency, ExchangeSituation
from syncnorm.tools.common.ranks import Ranks

CHANNELS = 512  # two vectors in fp32: 4 KiB per rank
LATE_SECONDS = 0.5e-3
_CALLS_PER_REPETITION = 20
_EPS = 1e-5
BACK_TO_BACK, AFTER_WORK, ONE_LATE = "back to back", "after other work", "one rank 0.5 ms late"


def measure_exchange(settings: BenchSettings, ranks: Ranks) -> ExchangeLatency | None:
    """Times the gather of the forward over the layer's own connections, whatever they are made of.

    The backward's sum sends as many bytes the same way, except over native collectives.

    Returns:
        None where ranks exchange nothing on CPUs: on GPUs, and in worlds of a single process.

    Collective: all ranks.
    """
    if ranks.device.type != "cpu" or ranks.backend == "fake" or ranks.world_size == 1:
        return None
    gather = _Gather()
    befores: Mapping[str, Step | None] = {
        BACK_TO_BACK: None,
        AFTER_WORK: OtherWork(ranks.rank),
        ONE_LATE: _OneRankLate(ranks.rank, ranks.world_size),
    }
    warm_up({"gather": gather})
    calls = _CALLS_PER_REPETITION * settings.repetitions
    situations = []
    for name, before in befores.items():
        seconds = call_by_call({"gather": gather}, ranks, calls, before).seconds["gather"]
        situations.append(
            ExchangeSituation(name, seconds, median(seconds), quantiles(seconds, n=10, method="inclusive")[-1])
        )
    return ExchangeLatency(2 * 4 * CHANNELS, transport_of(gather.group), tuple(situations))


def transport_of(group: dist.ProcessGroup) -> str:
    """How ranks of ``group`` send the statistics of tensors on CPUs, as ``SYNCNORM_TRANSPORT`` calls it."""
    exchange = exchange_of(group, torch.device("cpu"))
    if exchange is None:
        return "native"
    return exchange.transport


@dataclass
class _Gather:
    """One gather of all ranks. Collective: all ranks."""

    group: dist.ProcessGroup = field(init=False)
    _moments: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        assert dist.group.WORLD is not None
        self.group = dist.group.WORLD
        self._moments = torch.ones(2, CHANNELS)  # packed, as the layer does on CPUs

    def __call__(self) -> None:
        name, moments = "the gather of the benchmark", self._moments
        native = native_call(Kind.FORWARD, name, CHANNELS, moments.dtype, _EPS, self.group, moments.device)
        gather_moments((moments,), 1, _EPS, self.group, name, native)


@dataclass
class _OneRankLate:
    """Computes for `LATE_SECONDS` on one rank, the next one at each call; the others go on at once."""

    rank: int
    world_size: int
    _calls: int = 0

    def __call__(self) -> None:
        self._calls += 1
        if self._calls % self.world_size == self.rank:
            until = time.perf_counter() + LATE_SECONDS
            while time.perf_counter() < until:
                pass
