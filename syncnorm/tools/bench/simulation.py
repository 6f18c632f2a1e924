"""The cost model with parameters in: fitted, checked against what it was not fitted to, and asked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from syncnorm.comm.frames import capacity_for
from syncnorm.errors import InputError
from syncnorm.tools.bench.cost_model import (
    Host,
    LayerCost,
    Network,
    Ring,
    bytes_received,
    fit_host,
    fit_network,
    flat,
    frame_bytes,
    over_gloo,
    over_nccl,
    pays_from,
    two_level,
    worlds_up_to,
)
from syncnorm.tools.bench.growth_records import Arrangements, Check, Growth, HostSample, PaysFrom, Simulation, World
from syncnorm.tools.bench.models import NAME, build_model

LARGEST = 16384  # the search for the break-even looks at each world up to it
CHANNELS = 256  # of the single layer: in the middle of a ResNet
GROUP_SIZE = 8  # ranks of a usual node
FITTED_WORLDS = (2, 3)


@dataclass(frozen=True)
class Parameters:
    """What a user may say of a network; None is fitted to what is measured here.

    The ring's are those that NCCL itself reckons with for a ring over a network in its low-latency protocol
    (``src/graph/tuning.cc``: baseLat, hwLat), and 100 Gbit/s; nothing here measures them.
    """

    latency_us: float | None = None
    per_message_us: float | None = None
    bandwidth_gb: float | None = None
    nccl_launch_us: float = 6.6
    nccl_hop_us: float = 2.7
    nccl_bandwidth_gb: float = 12.5

    def check(self) -> None:
        """Raises InputError where a time is negative or a bandwidth not positive."""
        for name, value in vars(self).items():
            bandwidth = name.endswith("_gb")
            if (value is not None and not (value > 0 if bandwidth else value >= 0)) or value == float("inf"):
                least = "more than 0" if bandwidth else "at least 0"
                raise InputError(f"{name} must be {least} and finite, got {value:g}")

    @property
    def given(self) -> tuple[str, ...]:
        """Names of the gloo network's parameters that are not to be fitted."""
        return tuple(n for n in ("latency_us", "per_message_us", "bandwidth_gb") if getattr(self, n) is not None)

    @property
    def complete(self) -> bool:
        """Whether nothing of the network has to be measured."""
        return len(self.given) == 3

    def network(self, growth: Growth | None) -> Network:
        """With what is not given fitted to the exchanges of worlds 2 and 3."""
        exchanges = growth.exchanges if growth is not None else ()
        samples = [(e.world_size, capacity_for(e.size), e.median) for e in exchanges if e.world_size in FITTED_WORLDS]
        per_byte = None if self.bandwidth_gb is None else 1e-9 / self.bandwidth_gb
        return fit_network(samples, _seconds(self.latency_us), _seconds(self.per_message_us), per_byte)

    def ring(self) -> Ring:
        """NCCL's."""
        return Ring(self.nccl_launch_us * 1e-6, self.nccl_hop_us * 1e-6, 1e-9 / self.nccl_bandwidth_gb)


def simulate(
    largest: int,
    parameters: Parameters,
    growth: Growth | None,
    host_samples: Sequence[HostSample],
    host_left_out: Sequence[HostSample],
) -> Simulation:
    """Fits, checks and asks the model; nothing is measured here.

    Args:
        largest: ranks of the largest world.
        parameters: what the user says of the network.
        growth: what was measured in worlds of 2 and 3, for what the user does not say; the model is checked against
            its other worlds.
        host_samples: to fit to.
        host_left_out: to check against.
    """
    network, ring = parameters.network(growth), parameters.ring()
    host = fit_host([(s.world_size, s.channels, s.seconds) for s in host_samples])
    widths = model_channels()
    costs = (over_gloo(network, host), over_nccl(ring))
    of_layer, nccl_of_layer = (_Asked(cost, (CHANNELS,)) for cost in costs)
    of_model, nccl_of_model = (_Asked(cost, widths) for cost in costs)
    worlds = [
        World(
            w,
            bytes_received(w, CHANNELS),
            sum(bytes_received(w, c) for c in widths),
            *(asked.in_world(w) for asked in (of_layer, of_model, nccl_of_layer, nccl_of_model)),
        )
        for w in worlds_up_to(largest)
    ]
    # A group smaller than the world always costs less: each further rank costs something.
    grouped = 2 * GROUP_SIZE if largest >= 2 * GROUP_SIZE else None
    checks = [*_host_checks(host, host_left_out)]
    if growth is not None:
        checks = [*_exchange_checks(network, growth), *_layer_checks(network, host, growth), *checks]
    return Simulation(
        largest=largest,
        channels=CHANNELS,
        model_channels=widths,
        model_name=NAME,
        group_size=GROUP_SIZE,
        network=network,
        given=parameters.given,
        fit_oversubscribed=growth is not None
        and any(e.oversubscribed for e in growth.exchanges if e.world_size in FITTED_WORLDS),
        ring=ring,
        host=host,
        host_samples=tuple(host_samples),
        checks=tuple(checks),
        worlds=tuple(worlds),
        pays_from=PaysFrom(
            two_level_layer=pays_from(of_layer.step, largest),
            two_level_model=pays_from(of_model.step, largest),
            grouped=grouped,
            nccl_two_level_layer=pays_from(nccl_of_layer.step, largest),
            nccl_two_level_model=pays_from(nccl_of_model.step, largest),
        ),
    )


def model_channels() -> tuple[int, ...]:
    """Widths of the norm layers of the model that `syncnorm bench` trains, in the order in which they are built."""
    return tuple(m.num_features for m in build_model().modules() if isinstance(m, nn.BatchNorm2d))


class _Asked:
    """One kind of network and one list of layers."""

    def __init__(self, cost: LayerCost, channels: Sequence[int]) -> None:
        self.step = flat(cost, channels)

    def in_world(self, world_size: int) -> Arrangements:
        best_g, seconds = two_level(self.step, world_size) or (None, None)
        grouped = self.step(GROUP_SIZE) if world_size % GROUP_SIZE == 0 else None
        return Arrangements(self.step(world_size), seconds, best_g, grouped)


def _exchange_checks(network: Network, growth: Growth) -> Iterator[Check]:
    for cost in growth.exchanges:
        if cost.world_size not in FITTED_WORLDS:
            predicted = network.exchange(cost.world_size, capacity_for(cost.size))
            yield _check("exchange", cost.world_size, cost.size, predicted, cost.median, cost.oversubscribed)


def _layer_checks(network: Network, host: Host, growth: Growth) -> Iterator[Check]:
    for cost in growth.layers:
        if cost.world_size > 1:
            work = host.own(cost.size) + host.merging(cost.world_size, cost.size)
            # The exchanges' parameters were measured with shared cores, a rank's own work with one to itself.
            work *= max(1, cost.world_size / growth.cores)
            predicted = 2 * network.exchange(cost.world_size, frame_bytes(cost.size)) + work
            yield _check("layer", cost.world_size, cost.size, predicted, cost.median, cost.oversubscribed)


def _host_checks(host: Host, left_out: Sequence[HostSample]) -> Iterator[Check]:
    for sample in left_out:
        predicted = host.own(sample.channels) + host.merging(sample.world_size, sample.channels)
        yield _check("host", sample.world_size, sample.channels, predicted, sample.seconds, False)


def _check(what: str, world_size: int, size: int, predicted: float, measured: float, over: bool) -> Check:
    return Check(what, world_size, size, predicted, measured, predicted / measured, over)


def _seconds(microseconds: float | None) -> float | None:
    return None if microseconds is None else microseconds * 1e-6
