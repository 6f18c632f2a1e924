"""The statistics of the whole batch from those of this rank's part: gathered, merged, judged, remembered."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from syncnorm import collectives, kernels, moments, recomputation
from syncnorm.checks import check_count
from syncnorm.errors import SyncNormError


def of_all_ranks(
    local_mean: Tensor,
    local_invstd: Tensor,
    local_count: int | Tensor,
    eps: float,
    group: dist.ProcessGroup | None,
    layer: str,
    segments: list[Any],
    running: moments.Running | None = None,
) -> tuple[recomputation.Gathered, Tensor | None]:
    """The statistics of the whole batch, with which ``running`` is moved, and its variance.

    That is None, and ``running`` stays, where a checkpointed forward is computed again: it has had them.

    Raises:
        InputError: one value a channel over all ranks; ``running`` is as it was.
        SyncNormError: as the gather.
    """
    again = recomputation.in_backward()
    if again and group is not None:
        try:
            first_run = recomputation.recall(layer, torch.stack([local_mean, local_invstd]), int(local_count))
        except SyncNormError as error:
            collectives.refuse(str(error), group, local_mean.device)
            raise
        if first_run is not None:
            return first_run, None
    gathered = collectives.gather_moments(local_mean, local_invstd, local_count, eps, group, layer)
    check_count(gathered.counts, local_count)
    known = again and group is None
    merge = kernels.for_device(local_mean.device).merge
    mean, invstd, var, count = merge(gathered.moments, gathered.counts, eps, None if known else running)
    whole = recomputation.Gathered(mean, invstd, count, group, gathered.number)
    if segments:
        recomputation.keep(layer, whole, torch.stack([local_mean, local_invstd]), int(local_count), segments)
    return whole, None if known else var
