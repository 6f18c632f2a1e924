"""What every rank of a group has, side by side: for work between steps of training, where speed does not matter."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

from syncnorm.comm.native import _all_gather_into
from syncnorm.errors import SyncNormError

T = TypeVar("T")


def gather_rows(row: Tensor, group: dist.ProcessGroup | None, what: str) -> Tensor:
    """``row`` (n) of each rank as (W, n), in rank order, the same bits on every rank.

    Args:
        row: as long, and of the same dtype, on all ranks.
        group: all of its ranks must call; None is this process alone.
        what: for the message of an error.

    Raises:
        SyncNormError: the collective failed.
    """
    if group is None:
        return row.unsqueeze(0)
    rows = row.new_empty(group.size(), row.numel())
    with _explained(what):
        _all_gather_into(rows.view(-1), row, group=group)
    return rows


def gather_objects(value: T, group: dist.ProcessGroup | None, what: str) -> list[T]:
    """``value`` of each rank, pickled, in rank order. Arguments and errors as of :func:`gather_rows`."""
    if group is None:
        return [value]
    values = [value] * group.size()
    with _explained(what):
        dist.all_gather_object(values, value, group=group)
    return values


@contextmanager
def _explained(what: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # torch.distributed's own errors are RuntimeErrors
        raise SyncNormError(
            f"rank {dist.get_rank()}: {what} failed. Usually another rank raised or died: look for the first error "
            f"on the other ranks. The backend said: {error}"
        ) from error
