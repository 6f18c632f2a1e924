"""Sums over a channel by several programs of one kernel launch.

Each program writes its part to memory. The last one to do so adds up the parts in the order of their numbers:
floating point addition is not associative, and results must not depend on which program was the last.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_kept: dict[tuple[torch.device, int], Tensor] = {}
_FIRST_SIZE = 4096


def semaphores(count: int, device: torch.device) -> Tensor:
    """``count`` or more int32 zeros, which :func:`is_last` counts up and the last program sets back to zero.

    They are kept, so that zeroing them is not one more launch. Launches on one stream run one after the other and can
    share them.
    """
    stream = 0
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            # A graph is replayed later, on any stream, maybe while another kernel uses those kept for this stream.
            # Memory of its own is in the pool of the graph, and each replay zeroes it.
            return torch.zeros(count, dtype=torch.int32, device=device)
        stream = torch.cuda.current_stream(device).cuda_stream
    kept = _kept.get((device, stream))
    if kept is None or kept.numel() < count:
        size = max(_FIRST_SIZE, 1 << (count - 1).bit_length())
        kept = _kept[device, stream] = torch.zeros(size, dtype=torch.int32, device=device)
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
