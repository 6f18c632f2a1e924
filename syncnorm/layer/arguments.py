"""The arguments of a call that are passed on together, from ``functional`` down to the gather and the sum."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

from syncnorm.layer.moments import Count, Running
from syncnorm.layer.window import Window


class Sync(NamedTuple):
    """The other participants of a forward.

    Attributes:
        group: its ranks share statistics; None is this process alone.
        layer_name: the name by which ranks compare their calls and errors name the layer.
        graph_owners: what ``checkpointing.graph_owners`` returned; empty outside of activation checkpointing.
        window: the earlier micro-batches that share statistics; None without gradient accumulation.
    """

    group: dist.ProcessGroup | None
    layer_name: str
    graph_owners: Sequence[Any] = ()
    window: Window | None = None


class NoGradArgs(NamedTuple):
    """The arguments of the forward that have no gradient.

    Attributes:
        eps: added to the biased variance.
        sync: the ranks that share statistics.
        padding: (batch, 1, *spatial), boolean, True where the input is padding (and zero); None for none.
        running: the running statistics to update, or None.
    """

    eps: float
    sync: Sync
    padding: Tensor | None
    running: Running | None


class ForwardCall(NamedTuple):
    """What a backward has to know about its forward, besides tensors.

    Attributes:
        total_count: values per channel over all ranks, N in the formulas; of this micro-batch alone in a window.
        group: as of `Sync`. The graph owners are left out: a graph that held them would never be freed.
        layer_name: as of `Sync`.
        number: of the forward among all calls over the group.
        window: as of `Sync`.
        in_step: whether it was the forward of micro-batches that run in step; see ``layer.in_step``.
    """

    total_count: Count
    group: dist.ProcessGroup | None
    layer_name: str
    number: int
    window: Window | None = None
    in_step: bool = False
