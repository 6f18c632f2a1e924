"""The two collectives of a layer as torch.distributed's own, on the user's group and device: NCCL and others.

Ranks compare their calls without waiting for the device: a number that identifies the call travels with the values.
They compare the names of layers, which makes the host wait, at the first call of each layer and, in debug mode, at
every call.
"""

import os
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from syncnorm.comm.call import Call, explain_disagreement
from syncnorm.comm.gather import explained, gather_objects, gather_rows
from syncnorm.errors import SyncNormError

_debug = os.environ.get("SYNCNORM_DEBUG", "") not in ("", "0")


def set_debug(enabled: bool) -> None:
    """Sets whether ranks compare layer, width and dtype before each collective also on GPUs.

    All ranks must set the same value. On CPUs over gloo ranks always compare them, and this changes nothing. On GPUs
    it makes the host wait twice per layer. ``SYNCNORM_DEBUG=1`` in the environment has the same effect.
    """
    global _debug
    _debug = enabled


def gather(vectors: Sequence[Tensor], group: dist.ProcessGroup, call: Call, first: bool) -> Tensor:
    """Gathers the concatenated ``vectors`` (n) of all ranks into (W, n).

    Args:
        vectors: of one dtype.
        group: all of its ranks must call.
        call: what this rank does, to be compared with the other ranks.
        first: whether it is the layer's first call of this kind, at which ranks compare names.

    Raises:
        SyncNormError: the ranks made different calls, or the collective failed.
    """
    if (first or _debug) and not _fake(group):
        _compare(group, call)
    tag = float((call.key() + call.number) % 2**20)
    packed = torch.cat([*vectors, vectors[0].new_full((1,), tag)])
    gathered = gather_rows(packed, group, call)
    _check_tags(gathered[:, -1].eq(tag).all(), group, call)
    return gathered[:, :-1]


def reduce(
    vectors: Sequence[Tensor], group: dist.ProcessGroup, call: Call, first: bool
) -> Callable[[], tuple[Tensor, ...]]:
    """Starts to sum each of ``vectors`` over all ranks, concatenated. Arguments and errors as for :func:`gather`.

    Returns:
        A function that waits for the sums and returns them.
    """
    if (first or _debug) and not _fake(group):
        _compare(group, call)
    # fp32 represents integers exactly up to 2**24, also as a sum over ranks.
    tag = float((call.key() + call.number) % (2**24 // group.size()))
    packed = torch.cat([*vectors, vectors[0].new_full((1,), tag)])
    with explained(call, group):
        work = dist.all_reduce(packed, group=group, async_op=True)

    def finish() -> tuple[Tensor, ...]:
        with explained(call, group):
            work.wait()
        _check_tags(packed[-1] == tag * group.size(), group, call)
        return packed[:-1].chunk(len(vectors))

    return finish


def _compare(group: dist.ProcessGroup, call: Call) -> None:
    names = gather_objects(str(call), group, call)
    if len(set(names)) > 1:
        ranks = dist.get_process_group_ranks(group)
        raise SyncNormError(explain_disagreement(dist.get_rank(), dict(zip(ranks, names, strict=True))))


def _fake(group: dist.ProcessGroup) -> bool:
    """Whether the group is torch's fake backend, for measurements: its results come from no rank."""
    return dist.get_backend(group) == "fake"


def _check_tags(equal: Tensor, group: dist.ProcessGroup, call: Call) -> None:
    if _fake(group):
        return
    message = (
        f"rank {dist.get_rank()}: another rank did not run {call}. To see which layer each rank ran, set "
        f"SYNCNORM_DEBUG=1 or call syncnorm.set_debug(True) on all ranks"
    )
    try:
        torch._assert_async(equal, message)  # a GPU checks it later, and the host does not wait
    except RuntimeError as error:
        raise SyncNormError(message) from error
