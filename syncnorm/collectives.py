"""The two collectives of a synced layer: one gather in the forward, one reduction in the backward.

The only file of the package that communicates tensors.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from syncnorm.errors import SyncNormError

# torch 2.13 renames all_gather_into_tensor and warns of the old name, the only one that 2.11 knows.
_all_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def gather_moments(
    mean: Tensor, invstd: Tensor, count: int | Tensor, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Every rank's moments, from one all_gather of the packed ``[mean (C), invstd (C), count (1)]``.

    Args:
        mean: (C) of this rank.
        invstd: (C) of this rank, same dtype.
        count: values a channel on this rank; may be 0 and may differ by rank; a tensor () where a mask says it.
        group: all of its ranks must call; None is this process alone.

    Returns:
        ``(mean (W, C), invstd (W, C), count (W, 1))``: views of one fp64 buffer, rows in rank order, the same
        bits on every rank.
    """
    channels = mean.numel()
    # full() and not tensor(): a fill is a kernel, a copy of host memory would synchronise a GPU.
    packed_count = count.view(1).to(mean.dtype) if isinstance(count, Tensor) else mean.new_full((1,), count)
    packed = torch.cat([mean, invstd, packed_count])
    gathered = packed.unsqueeze(0)
    if group is not None:
        gathered = packed.new_empty(group.size(), packed.numel())
        with _explained("all_gather of the batch statistics", group):
            _all_gather_into(gathered.view(-1), packed, group=group)
    gathered = gathered.double()  # for the merge, in one piece
    return gathered[:, :channels], gathered[:, channels:-1], gathered[:, -1:]


def reduce_sums(sums: Sequence[Tensor], group: dist.ProcessGroup | None) -> tuple[Tensor, ...]:
    """Each of ``sums`` over all ranks, from one all_reduce of them packed.

    In the backward these are ``[sum_dy (C), sum_dy_xmu (C)]``.

    Args:
        sums: vectors of one length and dtype, the same number on all ranks.
        group: all of its ranks must call; None is this process alone.
    """
    if group is None:
        return tuple(sums)
    packed = torch.cat(tuple(sums))
    with _explained("all_reduce of the gradient sums", group):
        dist.all_reduce(packed, group=group)
    return packed.chunk(len(sums))


@contextmanager
def _explained(what: str, group: dist.ProcessGroup) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # DistBackendError and gloo's own errors are RuntimeErrors
        raise SyncNormError(
            f"rank {dist.get_rank()}: the {what} over ranks {dist.get_process_group_ranks(group)} failed. "
            f"Usually another rank raised, died or skipped this layer: look for the first error on the "
            f"other ranks. The backend said: {error}"
        ) from error
