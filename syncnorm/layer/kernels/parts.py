"""Sums over a channel by several programs of one kernel launch.

Each program writes its part to memory. The last one to do so adds up the parts in the order of their numbers:
floating point addition is not associative, and results must not depend on which program was the last.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_FIRST_SIZE = 4096
_kept: dict[tuple[torch.dtype, torch.device, int], Tensor] = {}


def semaphores(count: int, device: torch.device) -> Tensor:
    """``count`` or more int32 zeros, which :func:`is_last` counts up and the last program sets back to zero."""
    return _kept_zeros(torch.int32, count, device)


def partial_sums(count: int, device: torch.device) -> Tensor:
    """Memory for ``count`` or more fp32 values, by which the programs of one launch pass on their parts."""
    return _kept_zeros(torch.float32, count, device)


def _kept_zeros(dtype: torch.dtype, count: int, device: torch.device) -> Tensor:
    """Kept, so that neither zeroing nor allocating takes time in a step.

    Launches on one stream run one after the other and can share it.
    """
    stream = 0
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            # A graph is replayed later, on any stream, maybe while another kernel uses what is kept for this stream.
            # Memory of its own is in the pool of the graph, and each replay zeroes it.
            return torch.zeros(count, dtype=dtype, device=device)
        stream = torch._C._cuda_getCurrentRawStream(device.index)  # current_stream makes an object, which takes 10 us
    kept = _kept.get((dtype, device, stream))
    if kept is None or kept.numel() < count:
        size = max(_FIRST_SIZE, 1 << (count - 1).bit_length())
        kept = _kept[dtype, device, stream] = torch.zeros(size, dtype=dtype, device=device)
    return kept


@triton.jit
def is_last(semaphore, programs):
    """Whether all other programs have called this; it then sees what they have written before.

    What others wrote must be loaded with ``cache_modifier=".cg"``: the L1 cache of a multiprocessor may be stale.
    """
    tl.debug_barrier()  # one thread counts up, after all threads of this program have written
    last = tl.atomic_add(semaphore, 1, sem="acq_rel") == programs - 1
    if last:
        tl.store(semaphore, 0)  # for the next launch
    return last
