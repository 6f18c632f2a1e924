"""The cost of synchronization on a cluster of GPUs, by the collective of the forward: arithmetic, nothing measured.

W = number of ranks, C = channels. A step of a layer is a collective of the forward and an all_reduce of the backward.
Times are seconds. What the GPUs compute before and after, such as merging W rows, is not included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

_FP32_BYTES, _FP64_BYTES = 4, 8


@dataclass(frozen=True)
class Cluster:
    """Nodes of GPUs, one rank each, with NVLink inside a node and a network between nodes.

    Source: latencies of NCCL's own cost model for its low-latency protocol (NCCL 2.30, ``src/graph/tuning.cc``).

    Attributes:
        launch: seconds per collective, independent of its size.
        hop: seconds per hop of a ring that leaves the node.
        per_byte: seconds per byte and rank between nodes, 1 / bandwidth.
        ranks_per_node: GPUs of a node.
        tree_hop: seconds per hop of a tree that leaves the node, or of a ring whose ranks are all on different nodes.
        node_hop: seconds per hop inside a node.
        ring_node_hop: the same for a ring that also leaves the node, where the hosts have to start each step.
        node_per_byte: seconds per byte and rank inside a node.
    """

    launch: float
    hop: float
    per_byte: float
    ranks_per_node: int = 8
    tree_hop: float = 5.0e-6
    node_hop: float = 0.6e-6
    ring_node_hop: float = 1.0e-6
    node_per_byte: float = 1 / 141e9

    def nodes(self, world_size: int) -> int:
        """The number of nodes, all but the last of which are full."""
        return -(-world_size // self.ranks_per_node)

    def all_gather(self, world_size: int, num_bytes: int) -> float:
        """Seconds for ``num_bytes`` per rank, forwarded W - 1 times along a ring."""
        if world_size == 1:
            return 0.0
        return self._ring(world_size, world_size - 1, self.nodes(world_size) - 1, (world_size - 1) * num_bytes)

    def all_reduce(self, world_size: int, num_bytes: int) -> float:
        """Seconds for a ring of 2 (W - 1) steps, or trees of nodes with a chain inside each, whichever is faster."""
        if world_size == 1:
            return 0.0
        nodes = self.nodes(world_size)
        received = reduced_bytes(world_size, num_bytes)
        ring = self._ring(world_size, 2 * (world_size - 1), 2 * (nodes - 1), received)
        chain = -(-world_size // nodes) - 1
        depth = (nodes - 1).bit_length()
        tree = self.launch + 2 * (chain * self.node_hop + depth * self.tree_hop)
        return min(ring, tree + received * self._per_byte(world_size))

    def gather_between_nodes(self, nodes: int, num_bytes: int) -> float:
        """Seconds for a ring among ranks that are all on different nodes."""
        return 0.0 if nodes == 1 else self.launch + (nodes - 1) * (self.tree_hop + num_bytes * self.per_byte)

    def _ring(self, world_size: int, steps: int, steps_between: int, received: float) -> float:
        within = self.ring_node_hop if steps_between else self.node_hop
        hops = (steps - steps_between) * within + steps_between * self.hop
        return self.launch + hops + received * self._per_byte(world_size)

    def _per_byte(self, world_size: int) -> float:
        return self.node_per_byte if self.nodes(world_size) == 1 else self.per_byte


@dataclass(frozen=True)
class GpuCost:
    """What the forward's collectives and the backward's all_reduce of some layers cost.

    Attributes:
        received: bytes that a rank receives in a step, the mean over the ranks.
        seconds: of a step.
    """

    received: float
    seconds: float


# (cluster, W, C) -> cost of a step of a layer.
GpuLayerCost = Callable[[Cluster, int, int], GpuCost]


def gathered_bytes(channels: int) -> int:
    """Size of a row that is gathered: mean, invstd, count and tag, fp32."""
    return _FP32_BYTES * (2 * channels + 2)


def summed_bytes(channels: int) -> int:
    """Size of a row that is summed in the forward, fp64; see ``syncnorm.layer.global_sums``."""
    return _FP64_BYTES * (3 * channels + 2)


def backward_bytes(channels: int) -> int:
    """Size of a row that is summed in the backward: two sums and a tag, fp32."""
    return _FP32_BYTES * (2 * channels + 1)


def reduced_bytes(world_size: int, num_bytes: int) -> float:
    """Bytes that a rank receives in an all_reduce: of a ring exactly, of trees in the mean over the ranks."""
    return 2 * (world_size - 1) / world_size * num_bytes


def by_gather(cluster: Cluster, world_size: int, channels: int) -> GpuCost:
    """Every rank receives the rows of all others."""
    row = gathered_bytes(channels)
    return _step(cluster, world_size, channels, (world_size - 1) * row, cluster.all_gather(world_size, row))


def by_sum(cluster: Cluster, world_size: int, channels: int) -> GpuCost:
    """One all_reduce of the rows of all ranks."""
    row = summed_bytes(channels)
    received, seconds = reduced_bytes(world_size, row), cluster.all_reduce(world_size, row)
    return _step(cluster, world_size, channels, received, seconds)


def by_two_gathers(cluster: Cluster, world_size: int, channels: int) -> GpuCost:
    """A gather on each node, and one of the merged rows among ranks of different nodes; of full nodes."""
    row, on_node = gathered_bytes(channels), cluster.ranks_per_node
    nodes = world_size // on_node
    seconds = cluster.all_gather(on_node, row) + cluster.gather_between_nodes(nodes, row)
    return _step(cluster, world_size, channels, (on_node - 1 + nodes - 1) * row, seconds)


def _step(cluster: Cluster, world_size: int, channels: int, received: float, seconds: float) -> GpuCost:
    row = backward_bytes(channels)
    return GpuCost(received + reduced_bytes(world_size, row), seconds + cluster.all_reduce(world_size, row))


def of_layers(layer: GpuLayerCost, cluster: Cluster, world_size: int, channels: Iterable[int]) -> GpuCost:
    """The cost of layers of these widths, which run one after the other."""
    costs = [layer(cluster, world_size, c) for c in channels]
    return GpuCost(sum(cost.received for cost in costs), sum(cost.seconds for cost in costs))


def sum_pays_from(cluster: Cluster, channels: Iterable[int], largest: int) -> int | None:
    """The smallest world of full nodes from which on, up to ``largest``, a sum costs less than a gather; or None."""
    widths, found = tuple(channels), None
    full = cluster.ranks_per_node
    for world_size in range(largest // full * full, 0, -full):
        gather, summed = (of_layers(layer, cluster, world_size, widths) for layer in (by_gather, by_sum))
        if summed.seconds >= gather.seconds:
            break
        found = world_size
    return found


RESNET50 = "a ResNet-50"


def resnet50_channels() -> tuple[int, ...]:
    """Widths of the 53 norm layers of a ResNet-50, in the order of its modules."""
    widths = [64]
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shortcut = [4 * width] if block == 0 else []
            widths += [width, width, 4 * width, *shortcut]
    return tuple(widths)
