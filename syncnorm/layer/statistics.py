"""The statistics of the whole batch from those of this rank's part: gathered, merged, judged, remembered."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from syncnorm import comm
from syncnorm.layer import checkpointing, kernels, moments
from syncnorm.layer.checks import check_count


def global_moments(
    local_mean: Tensor,
    local_invstd: Tensor,
    local_count: int | Tensor,
    eps: float,
    group: dist.ProcessGroup | None,
    layer: str,
    segments: list[Any],
    running: moments.Running | None = None,
    *,
    node: Any = None,
    tracks: bool = False,
) -> tuple[checkpointing.ForwardStatistics, bool]:
    """The statistics of the whole batch; moves ``running`` towards them.

    Where a checkpointed forward is computed again, they are those of its first run, and what that moved stays.

    Args:
        local_mean: (C), of this rank.
        local_invstd: (C), of this rank.
        local_count: values a channel on this rank.
        eps: inside ``local_invstd``.
        group: all of its ranks must call; None is this process alone.
        layer: its name.
        segments: ``recomputation.owners()``.
        running: to be moved, or None.
        node: of the autograd graph, that this is for.
        tracks: instead, that the caller moves statistics.

    Returns:
        The statistics, and whether running ones had to move.

    Raises:
        InputError: one value a channel over all ranks; ``running`` is as it was.
        SyncNormError: as the gather.
    """
    moves = int(tracks)
    if running is not None and running.momentum != 0:
        moves = running.mean.untyped_storage()._cdata
    counts = tracks or (running is not None and running.num_batches_tracked is not None)
    again = checkpointing.in_backward()
    local = torch.stack([local_mean, local_invstd]) if segments or again else local_mean
    if again:
        first = checkpointing.lookup(layer, local, int(local_count), moves)
        if first is not None:
            left, counts = first.left_to(moves, counts)
            if running is not None and first.var is not None:
                moments.update_running_(running, first.mean, first.var, first.count, left, counts)
            return first, left
        if group is None and checkpointing.known(layer):  # too far off to be recognized, so it has had them
            running = None
    gathered = comm.gather_moments(local_mean, local_invstd, local_count, eps, group, layer)
    check_count(gathered.counts, local_count)
    merge = kernels.for_device(local_mean.device).merge
    mean, invstd, var, count = merge(gathered.moments, gathered.counts, eps, running)
    whole = checkpointing.ForwardStatistics(mean, invstd, count, group, gathered.number, var)
    whole.note(moves, counts)
    if segments:
        checkpointing.remember(layer, whole, local, int(local_count), segments, node)
    return whole, moves != 0
