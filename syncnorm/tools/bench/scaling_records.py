"""What was measured and simulated about the cost of a step in larger worlds. Times are seconds per step."""

from __future__ import annotations

from dataclasses import dataclass

from syncnorm.tools.bench.cluster_model import Cluster, GpuCost
from syncnorm.tools.bench.cost_model import Host, Network


@dataclass(frozen=True)
class Cost:
    """One contender in one world.

    Attributes:
        world_size: number of ranks.
        size: channels of a layer, layers of a stack, or bytes of the payload of an exchange.
        oversubscribed: there are more ranks than cores, so ranks wait for a core as well as for each other.
        steps_per_block: steps that are timed as one block.
        seconds: time of a step on the slowest rank, per repetition.
        median: of ``seconds``.
        p25: its lower quartile.
        p75: its upper quartile.
        ratio_to_two: median over the repetitions of (this time / the time in a world of two).
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
class Scaling:
    """Costs in worlds of 1, 2, ... ranks on this machine.

    Attributes:
        worlds: the world sizes. In a world of one, the layer is plain batch norm.
        cores: number of cores that the ranks share.
        places: elements per channel of the layer's input, N * H * W.
        stack_channels: channels of each layer of a stack.
        layers: forward and backward of one synchronized layer, by channels.
        stacks: forward and backward of several consecutive layers, by their number.
        exchanges: one exchange, of which a layer has one in the forward and one in the backward, by payload; for two
            ranks or more.
        transport: what the exchanges of the largest world went through.
    """

    worlds: tuple[int, ...]
    cores: int
    places: int
    stack_channels: int
    layers: tuple[Cost, ...]
    stacks: tuple[Cost, ...]
    exchanges: tuple[Cost, ...]
    transport: str = "gloo"


@dataclass(frozen=True)
class HostSample:
    """A step of a layer on torch's ``fake`` process group, without the time of the group's own collectives."""

    world_size: int
    channels: int
    seconds: float


@dataclass(frozen=True)
class ModelCheck:
    """A prediction of the cost model compared with a measurement that it was not fitted to.

    Attributes:
        what: exchange, layer or host.
        world_size: number of ranks.
        size: bytes of the payload of an exchange, otherwise channels.
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
    """Seconds per step, by which ranks exchange with each other.

    Attributes:
        flat: every rank with every other rank.
        two_level: first among g ranks and then among W / g, with exact statistics; exists only in this model. None
            if W is prime.
        best_g: the g with the lowest cost.
        grouped: only the ranks of a group of `Simulation.group_size`, which share statistics among themselves alone;
            None if W is not a multiple of it.
    """

    flat: float
    two_level: float | None
    best_g: int | None
    grouped: float | None


@dataclass(frozen=True)
class SimulatedWorld:
    """The bytes that a rank receives, and the cost of a step, over gloo."""

    world_size: int
    layer_bytes: int
    model_bytes: int
    layer: Arrangements
    model: Arrangements


@dataclass(frozen=True)
class BreakEven:
    """The world size from which on an arrangement costs less than the flat one; None if there is none."""

    two_level_layer: int | None
    two_level_model: int | None
    grouped: int | None


@dataclass(frozen=True)
class GpuWorld:
    """The cost of a step of a model's layers, by how the statistics of the forward meet.

    Attributes:
        world_size: number of ranks.
        gather: every rank receives the rows of all others.
        summed: one all_reduce.
        two_level: a gather on each node, then one between nodes; None on one node, or if nodes would differ in size.
    """

    world_size: int
    gather: GpuCost
    summed: GpuCost
    two_level: GpuCost | None


@dataclass(frozen=True)
class GpuSimulation:
    """What the cost model predicts for a cluster of GPUs.

    Attributes:
        cluster: its parameters; assumed or given, never measured here.
        model_name: name of the model.
        model_channels: of its norm layers.
        worlds: 2, 4, 8, ... ranks and the largest.
        node: a world of one full node that gathers, as groups of its size do in any world.
        sum_pays_from: the world of full nodes from which on a sum costs less than a gather; None if there is none.
        sum_pays_from_layer: the same for the narrowest layer, which gains the least.
    """

    cluster: Cluster
    model_name: str
    model_channels: tuple[int, ...]
    worlds: tuple[GpuWorld, ...]
    node: GpuCost
    sum_pays_from: int | None
    sum_pays_from_layer: int | None


@dataclass(frozen=True)
class Simulation:
    """The parameters of the cost model, its checks, and its predictions.

    Attributes:
        largest: number of ranks of the largest world.
        channels: of the single layer.
        model_channels: of the layers of the model.
        model_name: name of that model.
        group_size: ranks per group of the grouped arrangement.
        network: gloo.
        given: names of the network's parameters that the user gave; the others are fitted.
        fit_oversubscribed: whether one of the worlds of the fit had more ranks than cores.
        host: fitted to torch's ``fake`` process group.
        host_samples: the samples of that fit.
        checks: comparisons with measurements outside the fits.
        worlds: 2, 4, 8, ... and the largest.
        pays_from: break-even world sizes.
        gpus: the same for GPUs; None in a record of an earlier version.
    """

    largest: int
    channels: int
    model_channels: tuple[int, ...]
    model_name: str
    group_size: int
    network: Network
    given: tuple[str, ...]
    fit_oversubscribed: bool
    host: Host
    host_samples: tuple[HostSample, ...]
    checks: tuple[ModelCheck, ...]
    worlds: tuple[SimulatedWorld, ...]
    pays_from: BreakEven
    gpus: GpuSimulation | None = None
