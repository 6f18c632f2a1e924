"""The batch norms of a model that keep running statistics, and whether all ranks hold the same ones."""

from itertools import zip_longest

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncnorm.comm.gather import gather_objects
from syncnorm.errors import SyncNormError


def tracking(model: nn.Module) -> dict[str, _BatchNorm]:
    """By name, the batch norms of ``model``, synced ones too, that have running statistics."""
    found = {n: m for n, m in model.named_modules() if isinstance(m, _BatchNorm) and m.running_mean is not None}
    return {name: layer for name, layer in found.items() if layer.running_var is not None}


def running(layer: _BatchNorm) -> tuple[Tensor, Tensor]:
    """``(running_mean, running_var)`` of a layer that :func:`tracking` found."""
    assert layer.running_mean is not None
    assert layer.running_var is not None
    return layer.running_mean, layer.running_var


def check_same(layers: dict[str, _BatchNorm], group: dist.ProcessGroup | None, what: str) -> None:
    """Refuses ranks that hold different layers, on all of them alike.

    Raises:
        SyncNormError: with the first layer that differs.

    Collective: all ranks of ``group``, one all_gather_object.
    """
    mine = [f"{name} of {running(layer)[0].numel()} channels" for name, layer in layers.items()]
    by_rank = gather_objects(mine, group, what)
    for rank, theirs in enumerate(by_rank):
        for ours, other in zip_longest(by_rank[0], theirs, fillvalue="no more"):
            if ours != other:
                raise SyncNormError(
                    f"{what} needs the same batch norms on all ranks: where rank 0 of the group has {ours}, rank "
                    f"{rank} has {other}. Build the same model on all of them; all statistics are as they were"
                )
