"""The collectives of torch.distributed itself, on the group and the device that the user gave: NCCL and others.

What ranks came for is compared without waiting for the device: a number that stands for the call travels with the
sums. Names are compared, at the price of a wait, at a layer's first call and at every one in debug mode.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from syncnorm.comm.call import Call, explain_disagreement
from syncnorm.errors import SyncNormError

# torch 2.13 renames all_gather_into_tensor and warns of the old name, the only one that 2.11 knows.
_all_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

_debug = os.environ.get("SYNCNORM_DEBUG", "") not in ("", "0")


def set_debug(enabled: bool) -> None:
    """Lets ranks compare layer, width and dtype before each collective, also on GPUs; all ranks must set the same.

    On CPUs over gloo they always do, and this changes nothing. On GPUs it makes the host wait twice a layer.
    ``SYNCNORM_DEBUG=1`` in the environment is the same.
    """
    global _debug
    _debug = enabled


def gather(vectors: Sequence[Tensor], group: dist.ProcessGroup, call: Call, first: bool) -> Tensor:
    """``vectors``, packed (n), of all ranks, (W, n); names are compared at a layer's first call."""
    if (first or _debug) and not _fake(group):
        _compare(group, call)
    tag = float((call.key() + call.number) % 2**20)
    packed = torch.cat([*vectors, vectors[0].new_full((1,), tag)])
    gathered = packed.new_empty(group.size(), packed.numel())
    with _explained(group, call):
        _all_gather_into(gathered.view(-1), packed, group=group)
    _check(gathered[:, -1].eq(tag).all(), group, call)
    return gathered[:, :-1]


def reduce(
    vectors: Sequence[Tensor], group: dist.ProcessGroup, call: Call, first: bool
) -> Callable[[], tuple[Tensor, ...]]:
    """Starts to sum each of ``vectors`` over all ranks, packed; what is returned waits for it."""
    if (first or _debug) and not _fake(group):
        _compare(group, call)
    # Sums of fp32 are exact to 2**24.
    tag = float((call.key() + call.number) % (2**24 // group.size()))
    packed = torch.cat([*vectors, vectors[0].new_full((1,), tag)])
    with _explained(group, call):
        work = dist.all_reduce(packed, group=group, async_op=True)

    def finish() -> tuple[Tensor, ...]:
        with _explained(group, call):
            work.wait()
        _check(packed[-1] == tag * group.size(), group, call)
        return packed[:-1].chunk(len(vectors))

    return finish


def _compare(group: dist.ProcessGroup, call: Call) -> None:
    names = [""] * group.size()
    with _explained(group, call):
        dist.all_gather_object(names, str(call), group=group)
    if len(set(names)) > 1:
        ranks = dist.get_process_group_ranks(group)
        raise SyncNormError(explain_disagreement(dist.get_rank(), dict(zip(ranks, names, strict=True))))


def _fake(group: dist.ProcessGroup) -> bool:
    """Torch's group without peers, for measuring: what it hands back is nobody's."""
    return dist.get_backend(group) == "fake"


def _check(same: Tensor, group: dist.ProcessGroup, call: Call) -> None:
    if _fake(group):
        return
    message = (
        f"rank {dist.get_rank()}: another rank was not at {call}. SYNCNORM_DEBUG=1, or syncnorm.set_debug(True), "
        f"on all ranks tells at which layer each one was"
    )
    try:
        torch._assert_async(same, message)  # a GPU looks when it comes to it, and the host does not wait
    except RuntimeError as error:
        raise SyncNormError(message) from error


@contextmanager
def _explained(group: dist.ProcessGroup, call: Call) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # DistBackendError and the backends' own errors are RuntimeErrors
        raise SyncNormError(
            f"rank {dist.get_rank()}: {call} over ranks {dist.get_process_group_ranks(group)} failed. Usually "
            f"another rank raised, died or does not run this layer: look for the first error on the other ranks. "
            f"The backend said: {error}"
        ) from error
