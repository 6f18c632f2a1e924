"""What was measured and what was simulated of a step's cost in larger worlds. Times are seconds a step."""

from __future__ import annotations

from dataclasses import dataclass

from syncnorm.tools.bench.cost_model import Host, Network, Ring


@dataclass(frozen=True)
class Cost:
    """One contender in one world.

    Attributes:
        world_size: ranks.
        size: channels of a layer, layers of a stack, bytes of an exchange's payload.
        oversubscribed: more ranks than cores: they wait for a core as well as for each other.
        steps_per_block: timed at once.
        seconds: a step's time on the slowest rank, by repetition.
        median: of ``seconds``.
        p25: its lower quartile.
        p75: its upper quartile.
        ratio_to_two: median over the repetitions of this time / that in a world of two.
    """

    world_size: int
    size: int
    oversubscribed: bool
    steps_per_block: int
    seconds: tuple[float, ...]
    median: float
    p25: float
    p75: float
    ratio_to_two: float


@dataclass(frozen=True)
class Growth:
    """Costs in worlds of 1, 2, ... ranks on this machine.

    Attributes:
        worlds: how many ranks each has. In a world of one the layer is plain batch norm.
        cores: that the ranks share.
        places: values a channel of the layers' input.
        stack_channels: of each layer of a stack.
        layers: forward and backward of one synced layer, by channels.
        stacks: of several, one after the other, by their number.
        exchanges: what a layer's forward and its backward have one of each, by payload; from two ranks on.
    """

    worlds: tuple[int, ...]
    cores: int
    places: int
    stack_channels: int
    layers: tuple[Cost, ...]
    stacks: tuple[Cost, ...]
    exchanges: tuple[Cost, ...]


@dataclass(frozen=True)
class HostSample:
    """A layer's step on torch's ``fake`` process group, less what that group itself takes."""

    world_size: int
    channels: int
    seconds: float


@dataclass(frozen=True)
class Check:
    """What the model says against what was measured and not fitted to.

    Attributes:
        what: exchange, layer or host.
        world_size: ranks.
        size: bytes of an exchange's payload, else channels.
        predicted: seconds.
        measured: seconds.
        ratio: predicted / measured.
        oversubscribed: as in `Cost`.
    """

    what: str
    world_size: int
    size: int
    predicted: float
    measured: float
    ratio: float
    oversubscribed: bool


@dataclass(frozen=True)
class Arrangements:
    """Seconds of one step by who exchanges with whom.

    Attributes:
        flat: all ranks with all.
        two_level: among g and then among W / g, exact statistics; in this model only. None where W is prime.
        best_g: the g for which that takes least.
        grouped: only ranks of one group of `Simulation.group_size`, whose statistics alone they share; None where
            that does not divide W.
    """

    flat: float
    two_level: float | None
    best_g: int | None
    grouped: float | None


@dataclass(frozen=True)
class World:
    """A simulated world: what a rank receives over gloo, and what a step costs, over gloo and over NCCL."""

    world_size: int
    layer_bytes: int
    model_bytes: int
    layer: Arrangements
    model: Arrangements
    nccl_layer: Arrangements
    nccl_model: Arrangements


@dataclass(frozen=True)
class PaysFrom:
    """World sizes from which on an arrangement costs less than the flat one; None: not up to the largest."""

    two_level_layer: int | None
    two_level_model: int | None
    grouped: int | None
    nccl_two_level_layer: int | None
    nccl_two_level_model: int | None


@dataclass(frozen=True)
class Simulation:
    """The cost model's parameters, how far it can be trusted, and what it says.

    Attributes:
        largest: ranks of the largest world.
        channels: of the single layer.
        model_channels: of the model's layers.
        model_name: whose widths these are.
        group_size: of the arrangement in groups.
        network: over gloo.
        given: names of the network's parameters that were not fitted.
        fit_oversubscribed: whether one of the worlds that it was fitted to was.
        ring: over NCCL; assumed or given, never measured here.
        host: fitted to torch's ``fake`` process group.
        host_samples: those it was fitted to.
        checks: against what was left out of the fits.
        worlds: 2, 4, 8, ... and the largest.
        pays_from: break-evens.
    """

    largest: int
    channels: int
    model_channels: tuple[int, ...]
    model_name: str
    group_size: int
    network: Network
    given: tuple[str, ...]
    fit_oversubscribed: bool
    ring: Ring
    host: Host
    host_samples: tuple[HostSample, ...]
    checks: tuple[Check, ...]
    worlds: tuple[World, ...]
    pays_from: PaysFrom
