"""The cost model with its parameters: the host's are measured, the network's fitted or given.

A rank's own work in a large world is measured without that world, on torch's ``fake`` group (see ``single_process``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch
import torch.distributed as dist
from torch import nn

from syncnorm.comm.frames import capacity_for
from syncnorm.comm.gather import gather_rows
from syncnorm.errors import InputError
from syncnorm.modules import SyncBatchNorm2d
from syncnorm.tools.bench.cluster_model import (
    RESNET50,
    Cluster,
    by_gather,
    by_sum,
    by_two_gathers,
    of_layers,
    resnet50_channels,
    sum_pays_from,
)
from syncnorm.tools.bench.cost_model import (
    Host,
    Network,
    StepCost,
    bytes_received,
    fit_host,
    fit_network,
    flat,
    frame_bytes,
    over_gloo,
    two_level,
    two_level_pays_from,
    worlds_up_to,
)
from syncnorm.tools.bench.layers import LayerStep, make_inputs
from syncnorm.tools.bench.measure import ContenderKey, Step, timed_in_blocks, warm_up
from syncnorm.tools.bench.scaling_records import (
    Arrangements,
    BreakEven,
    GpuSimulation,
    GpuWorld,
    HostSample,
    ModelCheck,
    Scaling,
    SimulatedWorld,
    Simulation,
)
from syncnorm.tools.bench.shapes import scaling_shape
from syncnorm.tools.bench.single_process import fake_world
from syncnorm.tools.common.nets import RESNET_NAME, build_resnet18

LARGEST = 16384  # the search for the break-even tries every world up to it
_CHANNELS = 256  # of the single layer: in the middle of a ResNet
_GROUP_SIZE = 8  # GPUs of a usual node
_FITTED_WORLDS = (2, 3)
# Of the host. The last but one is left out of the fit, to check it.
_HOST_WORLDS, _QUICK_HOST_WORLDS = (2, 8, 64, 256, 512, 1024), (2, 8, 32, 64)
_HOST_CHANNELS, _QUICK_HOST_CHANNELS = (16, 64, 256, 1024), (16, 64)
# Shorter than where processes wait for each other, which nothing does here, and there is much to measure.
_HOST_BLOCK_SECONDS = 0.005


@dataclass(frozen=True)
class Parameters:
    """What the user can specify about a network; a parameter that is None is fitted to the measured worlds.

    The defaults of NCCL are those of its own cost model, see `Cluster`, and 100 Gbit/s; they are not measured.
    """

    latency_us: float | None = None
    per_message_us: float | None = None
    bandwidth_gb: float | None = None
    nccl_launch_us: float = 6.6
    nccl_hop_us: float = 2.7
    nccl_bandwidth_gb: float = 12.5

    def check(self) -> None:
        """Raises InputError if a time is negative, a bandwidth is not positive, or one of them is not finite."""
        for name, value in vars(self).items():
            bandwidth = name.endswith("_gb")
            if (value is not None and not (value > 0 if bandwidth else value >= 0)) or value == float("inf"):
                least = "more than 0" if bandwidth else "at least 0"
                raise InputError(f"{name} must be {least} and finite, got {value:g}")

    @property
    def given(self) -> tuple[str, ...]:
        """Names of the parameters of the gloo network that are not fitted."""
        return tuple(n for n in ("latency_us", "per_message_us", "bandwidth_gb") if getattr(self, n) is not None)

    @property
    def complete(self) -> bool:
        """Whether no parameter of the network has to be measured."""
        return len(self.given) == 3

    def network(self, scaling: Scaling | None) -> Network:
        """The gloo network; missing parameters are fitted to the exchanges of the worlds of 2 and 3 ranks."""
        exchanges = scaling.exchanges if scaling is not None else ()
        samples = [
            (e.world_size, capacity_for(e.size), e.median) for e in exchanges if e.world_size in _FITTED_WORLDS
        ]
        per_byte = None if self.bandwidth_gb is None else 1e-9 / self.bandwidth_gb
        return fit_network(samples, _seconds(self.latency_us), _seconds(self.per_message_us), per_byte)

    def cluster(self) -> Cluster:
        """The cluster of GPUs."""
        return Cluster(self.nccl_launch_us * 1e-6, self.nccl_hop_us * 1e-6, 1e-9 / self.nccl_bandwidth_gb)


def _seconds(microseconds: float | None) -> float | None:
    return None if microseconds is None else microseconds * 1e-6


def measure_host(repetitions: int, quick: bool) -> tuple[tuple[HostSample, ...], tuple[HostSample, ...]]:
    """Times the step of a layer in fake worlds, in this process, which must not have a process group.

    Returns:
        The samples for the fit, and those of one world to check the fit.
    """
    worlds, channels = (_HOST_WORLDS, _HOST_CHANNELS) if not quick else (_QUICK_HOST_WORLDS, _QUICK_HOST_CHANNELS)
    with fake_world(max(worlds), torch.device("cpu")) as ranks:
        steps: dict[ContenderKey, Step] = {}
        for world_size in worlds:
            group = dist.new_group(list(range(world_size)), backend="fake")
            for width in channels:
                inputs = make_inputs(scaling_shape(width), "contiguous", "fp32", ranks.device, seed=0)
                layer = SyncBatchNorm2d(width, process_group=group)
                steps["step", world_size, width] = LayerStep(layer, inputs)
                steps["collectives", world_size, width] = _FakeCollectives(group, width)
                steps["rows", world_size, width] = _SumOfRows(torch.ones(world_size, 2 * width))
        warm_up({"/".join(map(str, key)): step for key, step in steps.items()})
        timed = timed_in_blocks(steps, ranks, repetitions, _HOST_BLOCK_SECONDS)
    seconds = {key: times for key, (_, times) in timed.items()}
    samples = {w: tuple(HostSample(w, c, _host_seconds(seconds, w, c)) for c in channels) for w in worlds}
    left_out = samples.pop(worlds[-2])
    return tuple(sample for of_world in samples.values() for sample in of_world), left_out


def _host_seconds(seconds: Mapping[ContenderKey, tuple[float, ...]], world_size: int, channels: int) -> float:
    step, collectives, rows = (seconds[kind, world_size, channels] for kind in ("step", "collectives", "rows"))
    return median(s - c + r for s, c, r in zip(step, collectives, rows, strict=True))


@dataclass(frozen=True)
class _FakeCollectives:
    """The group's part of the step of a layer, to be subtracted: no real backend writes the gather row by row.

    Allocates the memory of the gather each time, as the layer does.
    """

    group: dist.ProcessGroup
    channels: int

    def __call__(self) -> None:
        packed, sums = torch.ones(2 * self.channels + 2), torch.ones(2 * self.channels + 1)
        gather_rows(packed, self.group, "the gather of the benchmark")
        dist.all_reduce(sums, group=self.group)


@dataclass(frozen=True)
class _SumOfRows:
    """To be added: over gloo a rank adds up the rows of the backward itself; the fake group returns the sum."""

    rows_W2C: torch.Tensor

    def __call__(self) -> None:
        self.rows_W2C.sum(0)


def simulate(
    largest: int,
    parameters: Parameters,
    scaling: Scaling | None,
    host_samples: Sequence[HostSample],
    host_left_out: Sequence[HostSample],
) -> Simulation:
    """Fits, checks and evaluates the cost model; nothing is measured here.

    Args:
        largest: number of ranks of the largest world.
        parameters: of the network, as far as the user gave them.
        scaling: the measured worlds. Missing parameters are fitted to those of 2 and 3 ranks; the model is checked
            against the others.
        host_samples: for the fit of the host.
        host_left_out: to check that fit.
    """
    network = parameters.network(scaling)
    host = fit_host([(s.world_size, s.channels, s.seconds) for s in host_samples])
    widths = model_channels()
    cost = over_gloo(network, host)
    layer, model = flat(cost, (_CHANNELS,)), flat(cost, widths)
    worlds = [
        SimulatedWorld(
            w,
            bytes_received(w, _CHANNELS),
            sum(bytes_received(w, c) for c in widths),
            _arrangements(layer, w),
            _arrangements(model, w),
        )
        for w in worlds_up_to(largest)
    ]
    # A group smaller than the world always costs less, because each further rank costs something.
    grouped = 2 * _GROUP_SIZE if largest >= 2 * _GROUP_SIZE else None
    checks = [*_host_checks(host, host_left_out)]
    if scaling is not None:
        checks = [*_exchange_checks(network, scaling), *_layer_checks(network, host, scaling), *checks]
    return Simulation(
        largest=largest,
        channels=_CHANNELS,
        model_channels=widths,
        model_name=RESNET_NAME,
        group_size=_GROUP_SIZE,
        network=network,
        given=parameters.given,
        fit_oversubscribed=scaling is not None
        and any(e.oversubscribed for e in scaling.exchanges if e.world_size in _FITTED_WORLDS),
        host=host,
        host_samples=tuple(host_samples),
        checks=tuple(checks),
        worlds=tuple(worlds),
        pays_from=BreakEven(
            two_level_layer=two_level_pays_from(layer, largest),
            two_level_model=two_level_pays_from(model, largest),
            grouped=grouped,
        ),
        gpus=_simulate_gpus(largest, parameters.cluster()),
    )


def _simulate_gpus(largest: int, cluster: Cluster) -> GpuSimulation:
    widths, full = resnet50_channels(), cluster.ranks_per_node

    def world(world_size: int) -> GpuWorld:
        gather, summed = (of_layers(layer, cluster, world_size, widths) for layer in (by_gather, by_sum))
        several = world_size > full and world_size % full == 0
        two_level = of_layers(by_two_gathers, cluster, world_size, widths) if several else None
        return GpuWorld(world_size, gather, summed, two_level)

    return GpuSimulation(
        cluster=cluster,
        model_name=RESNET50,
        model_channels=widths,
        worlds=tuple(map(world, worlds_up_to(largest))),
        node=of_layers(by_gather, cluster, full, widths),
        sum_pays_from=sum_pays_from(cluster, widths, largest),
        sum_pays_from_layer=sum_pays_from(cluster, (min(widths),), largest),
    )


def model_channels() -> tuple[int, ...]:
    """Widths of the norm layers of the model of ``syncnorm bench model``, in the order in which they are built."""
    return tuple(m.num_features for m in build_resnet18().modules() if isinstance(m, nn.BatchNorm2d))


def _arrangements(step: StepCost, world_size: int) -> Arrangements:
    best_g, seconds = two_level(step, world_size) or (None, None)
    grouped = step(_GROUP_SIZE) if world_size % _GROUP_SIZE == 0 else None
    return Arrangements(step(world_size), seconds, best_g, grouped)


def _exchange_checks(network: Network, scaling: Scaling) -> Iterator[ModelCheck]:
    for cost in scaling.exchanges:
        if cost.world_size not in _FITTED_WORLDS:
            predicted = network.exchange(cost.world_size, capacity_for(cost.size))
            yield _check("exchange", cost.world_size, cost.size, predicted, cost.median, cost.oversubscribed)


def _layer_checks(network: Network, host: Host, scaling: Scaling) -> Iterator[ModelCheck]:
    for cost in scaling.layers:
        if cost.world_size > 1:
            work = host.own(cost.size) + host.merging(cost.world_size, cost.size)
            # The exchanges were measured with ranks that share cores, the host's work on a core of its own.
            work *= max(1, cost.world_size / scaling.cores)
            predicted = 2 * network.exchange(cost.world_size, frame_bytes(cost.size)) + work
            yield _check("layer", cost.world_size, cost.size, predicted, cost.median, cost.oversubscribed)


def _host_checks(host: Host, left_out: Sequence[HostSample]) -> Iterator[ModelCheck]:
    for sample in left_out:
        predicted = host.own(sample.channels) + host.merging(sample.world_size, sample.channels)
        yield _check("host", sample.world_size, sample.channels, predicted, sample.seconds, False)


def _check(
    what: str, world_size: int, size: int, predicted: float, measured: float, oversubscribed: bool
) -> ModelCheck:
    return ModelCheck(what, world_size, size, predicted, measured, predicted / measured, oversubscribed)
