"""Gathers over the user's process group, on its own backend: the value of each rank, in rank order, on every rank.

Work between training steps uses them directly. The layer does where it cannot exchange frames (see ``native``).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

from syncnorm._torch_versions import all_gather_single
from syncnorm.errors import SyncNormError

T = TypeVar("T")


def gather_rows(row: Tensor, group: dist.ProcessGroup | None, what: object) -> Tensor:
    """Gathers ``row`` (n) of each rank into a tensor (W, n).

    Args:
        row: of the same length and dtype on all ranks.
        group: the process group; None means this process alone.
        what: the operation that gathers, for error messages; converted to text only if there is an error.

    Returns:
        The rows in rank order, with the same bits on every rank.

    Raises:
        SyncNormError: the collective failed.

    Collective: all ranks of ``group`` must call.
    """
    if group is None:
        return row.unsqueeze(0)
    rows = row.new_empty(group.size(), row.numel())
    with explained(what, group):
        all_gather_single(rows.view(-1), row, group=group)
    return rows


def gather_objects(value: T, group: dist.ProcessGroup | None, what: object) -> list[T]:
    """Gathers the pickled ``value`` of each rank into a list, in rank order.

    Arguments, errors and collective as for :func:`gather_rows`.
    """
    if group is None:
        return [value]
    values = [value] * group.size()
    with explained(what, group):
        dist.all_gather_object(values, value, group=group)
    return values


@contextmanager
def explained(what: object, group: dist.ProcessGroup) -> Iterator[None]:
    """Raises an error of the backend as a :class:`SyncNormError` that says what failed and where to look."""
    try:
        yield
    except RuntimeError as error:  # DistBackendError and the backends' own errors are RuntimeErrors
        raise SyncNormError(
            f"rank {dist.get_rank()}: {what} over ranks {dist.get_process_group_ranks(group)} failed. Usually "
            f"another rank raised an error, died, or does not make this call: look for the first error on the other "
            f"ranks. The backend reported: {error}"
        ) from error
