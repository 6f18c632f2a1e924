"""Running statistics of layers that are not synced: those of all ranks made one."""

from typing import Any

import torch
from torch import nn

from syncnorm.comm import process_groups
from syncnorm.comm.gather import gather_rows
from syncnorm.modules import Synced
from syncnorm.training.layers import check_same, running, tracking


def merge_buffers(model: nn.Module, process_group: Any = None) -> None:
    """Gives every plain batch norm of ``model``, in place, the running statistics of all ranks together.

    Without syncing each rank's statistics are of its own share of the data, and a checkpoint keeps those of one
    rank alone. Here the ranks count the same:

        mean = avg(mean_r)        var = avg(var_r) + avg((mean_r - mean)^2)

    The second term is how far the ranks lie apart, which an average of the variances would lose.
    ``num_batches_tracked`` becomes the largest of all ranks: it counts steps, which ranks make together, and not
    batches. Synced layers have the same statistics on all ranks already, and are left alone.

    Args:
        model: the same batch norms, of the same widths, on all ranks; wrapped in DDP or not.
        process_group: ranks to merge over, a ProcessGroup or 1-D DeviceMesh; None is the default group. Without
            one, or in a group of one rank, nothing changes.

    Raises:
        SyncNormError: ranks hold different layers; on all ranks, whose statistics are as they were.

    Collective: all ranks of the group must call: one all_gather for all layers, after one that compares names.

    Source: Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances"
    (1979), for sets of equal size.

    Example:
        >>> merge_buffers(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)))  # on all ranks, before saving
    """
    group = process_groups.synced_group(process_groups.resolve(process_group))
    layers = {n: m for n, m in tracking(model).items() if not isinstance(m, Synced | nn.SyncBatchNorm)}
    check_same(layers, group, "merge_buffers")
    if group is None or not layers:
        return
    # fp64 holds any fp32 statistic and any count of steps as it is.
    steps = [m.num_batches_tracked for m in layers.values() if m.num_batches_tracked is not None]
    statistics = [buffer for m in layers.values() for buffer in running(m)]
    packed = torch.cat([b.double().flatten() for b in (*statistics, *steps)])
    rows = gather_rows(packed, group, "merge_buffers")
    columns = iter(torch.split(rows, [b.numel() for b in (*statistics, *steps)], dim=1))
    for layer in layers.values():
        running_mean, running_var = running(layer)
        mean_WC, var_WC = next(columns), next(columns)
        mean = mean_WC.mean(0)
        running_mean.copy_(mean)
        running_var.copy_(var_WC.mean(0) + (mean_WC - mean).square().mean(0))
    for count, column in zip(steps, columns, strict=True):
        count.copy_(column.max())
