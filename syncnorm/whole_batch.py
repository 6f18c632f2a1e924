"""The statistics of the whole batch from those of this rank's part: gathered, merged, judged, remembered."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from syncnorm import collectives, moments, recomputation
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
) -> tuple[recomputation.Gathered, Tensor | None]:
    """The statistics of the whole batch, and its variance.

    That is None where a checkpointed forward is computed again: the running statistics have had it.
    """
    again = recomputation.in_backward()
    if again and group is not None:
        try:
            known = recomputation.recall(layer, torch.stack([local_mean, local_invstd]), int(local_count))
        except SyncNormError as error:
            collectives.refuse(str(error), group, local_mean.device)
            raise
        if known is not None:
            return known, None
    gathered = collectives.gather_moments(local_mean, local_invstd, local_count, eps, group, layer)
    mean, var_eps, count = moments.merge(gathered.moments, gathered.counts, eps)
    check_count(count, local_count)
    mean, var_eps = mean.to(local_mean.dtype), var_eps.to(local_mean.dtype)
    whole = recomputation.Gathered(mean, var_eps.rsqrt(), count, group, gathered.number)
    if segments:
        recomputation.keep(layer, whole, torch.stack([local_mean, local_invstd]), int(local_count), segments)
    return whole, None if again and group is None else var_eps.sub_(eps)
