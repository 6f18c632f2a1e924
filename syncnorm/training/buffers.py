"""The running statistics of a model's batch norms: finding them, and merging those of all ranks."""

from collections.abc import Mapping
from itertools import zip_longest

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncnorm.comm import process_groups
from syncnorm.comm.gather import gather_objects, gather_rows
from syncnorm.comm.process_groups import ProcessGroupLike
from syncnorm.errors import SyncNormError
from syncnorm.modules import Synced, TorchSyncBatchNorm


def merge_buffers(model: nn.Module, process_group: ProcessGroupLike = None) -> None:
    """Merges the running statistics of all ranks in every plain batch norm of ``model``, in place.

    Without synchronization the running statistics of a rank describe only its own data, and a checkpoint holds those
    of one rank. Here all W ranks have equal weight:

        mean = sum(mean_r) / W        var = sum(var_r + (mean_r - mean)^2) / W

    The second term is the variance between ranks, which an average of the variances omits. ``num_batches_tracked``
    becomes the maximum over ranks, because it counts steps, which all ranks make together. Synced layers already have
    the same statistics on all ranks and stay unchanged.

    Args:
        model: with the same batch norms, of the same widths, on all ranks; wrapped in DDP or not.
        process_group: ranks to merge over, a ProcessGroup or 1-D DeviceMesh; None is the default group. Nothing
            changes without a group or in a group of one rank.

    Raises:
        SyncNormError: on all ranks, if they hold different layers; the statistics are unchanged.

    Collective: all ranks of the group must call: one all_gather_object that compares the layers, then one all_gather
    for all layers.

    Source: Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances"
    (1979), for sets of equal size.

    Example:
        >>> merge_buffers(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)))  # on all ranks, before saving
    """
    group = process_groups.synced_group(process_groups.resolve(process_group))
    layers = {n: m for n, m in tracking_layers(model).items() if not isinstance(m, Synced | TorchSyncBatchNorm)}
    check_same_layers({n: running_stats(m)[0].numel() for n, m in layers.items()}, group, "merge_buffers")
    if group is None or not layers:
        return
    # fp64 represents fp32 statistics and counts of steps exactly.
    counts = [m.num_batches_tracked for m in layers.values() if m.num_batches_tracked is not None]
    statistics = [buffer for m in layers.values() for buffer in running_stats(m)]
    packed = torch.cat([b.double().flatten() for b in (*statistics, *counts)])
    rows = gather_rows(packed, group, "merge_buffers")
    columns = iter(torch.split(rows, [b.numel() for b in (*statistics, *counts)], dim=1))
    for layer in layers.values():
        running_mean, running_var = running_stats(layer)
        mean_WC, var_WC = next(columns), next(columns)
        mean = mean_WC.mean(0)
        running_mean.copy_(mean)
        running_var.copy_(var_WC.mean(0) + (mean_WC - mean).square().mean(0))
    for count, column in zip(counts, columns, strict=True):
        count.copy_(column.max())


def tracking_layers(model: nn.Module) -> dict[str, _BatchNorm]:
    """By name, the batch norms of ``model``, synced or not, that have running statistics."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, _BatchNorm) and m.running_mean is not None}
    return {name: layer for name, layer in layers.items() if layer.running_var is not None}


def running_stats(layer: _BatchNorm) -> tuple[Tensor, Tensor]:
    """``(running_mean, running_var)`` of a layer that :func:`tracking_layers` returns."""
    assert layer.running_mean is not None
    assert layer.running_var is not None
    return layer.running_mean, layer.running_var


def check_same_layers(channels: Mapping[str, int], group: dist.ProcessGroup | None, caller: str) -> None:
    """Raises on all ranks if they hold different layers.

    Args:
        channels: of each layer of this rank, by name.
        group: whose ranks to compare; None is this process alone.
        caller: name of the function that needs the same layers.

    Raises:
        SyncNormError: with the first layer that differs.

    Collective: all ranks of ``group``, one all_gather_object.
    """
    own_layers = [f"{name!r} with {count} channels" for name, count in channels.items()]
    by_rank = gather_objects(own_layers, group, caller)
    for rank, layers in enumerate(by_rank):
        for first, other in zip_longest(by_rank[0], layers, fillvalue="no further one"):
            if first != other:
                raise SyncNormError(
                    f"{caller} needs the same batch norms on all ranks: rank 0 of the group has {first}, rank {rank} "
                    f"has {other}. Build the same model on all ranks; no statistics were changed"
                )
