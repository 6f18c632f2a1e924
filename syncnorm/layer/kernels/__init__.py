"""The four passes over a tensor of a synced batch norm, and the merge between them.

The module of each device has the same functions. ``x`` and ``dy`` are dense in the same memory format
(:func:`dense`) and not empty; vectors are (C) in the statistics' dtype.

- ``local_moments(x, eps, scratch) -> mean, invstd``: of this rank's values; ``scratch``, like x, may be overwritten
- ``merge(moments_W2C, counts, eps, running) -> mean, invstd, var, count``: of the global batch, from the moments
  (W, 2C) of all ranks; updates the running statistics
- ``normalize(x, mean, invstd, weight, bias, y) -> y``: the result may be in ``y``, like x, or in new memory
- ``reduce_grad(dy, x, mean, invstd) -> sum_dy, sum_dy_xmu``: over this rank's values
- ``begin_grad(dy, invstd, weight) -> begun``: the part of dx that does not depend on other ranks
- ``finish_grad(begun, x, mean, invstd, weight, sum_dy, sum_dy_xmu, count) -> dx``: dx like x; the sums and the
  count are those of all ranks; ``begun`` may be overwritten
"""

from types import ModuleType

import torch
from torch import Tensor

from syncnorm.layer.kernels import cpu, cuda, native
from syncnorm.layer.moments import Count, statistics_dtype
from syncnorm.native import library

_ONE_THREAD_VALUES = 2**17  # up to here one thread in C takes less time than several in ATen


def passes_for(x: Tensor, *others: Tensor | None) -> ModuleType:
    """The passes for x: in C if they can read all of these tensors and one thread is enough, else as of the device.

    Args:
        x: dense, and the tensor with the most values.
        others: that the pass reads.
    """
    if (
        library is not None
        and (x.dtype == torch.float32 or x.dtype == torch.bfloat16)
        and (torch.get_num_threads() == 1 or x.numel() <= _ONE_THREAD_VALUES)
        and native.supports(x, *others)
    ):
        return native
    return for_device(x.device)


def for_device(device: torch.device) -> ModuleType:
    """The passes for a device; those in plain ATen (``cpu``) unless there are better ones."""
    return cuda if device.type == "cuda" else cpu


def moments_of(x: Tensor, eps: float, scratch: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor, Count]:
    """``local_moments``, also of an empty or padded x, and the count of values per channel.

    Padding is zero in x, and later in dy, so it changes no other sum.
    """
    if x.numel() == 0:  # an empty rank takes part as well; its moments have no weight in the merge
        mean = torch.zeros(x.size(1), dtype=statistics_dtype(x.dtype), device=x.device)
        return mean, torch.ones_like(mean), 0
    if padding is not None:
        return cpu.masked_moments(x, eps, padding)
    return *passes_for(x).local_moments(x, eps, scratch), x.numel() // x.size(1)


def memory_format(x: Tensor) -> torch.memory_format:
    """channels_last(_3d) if the channel is the fastest axis of a 4-D or 5-D tensor, else contiguous."""
    if x.dim() in (4, 5) and x.stride(1) == 1 and not x.is_contiguous():
        return torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    return torch.contiguous_format


def dense(x: Tensor, layout: torch.memory_format) -> Tensor:
    """``x`` without gaps or overlaps, with exactly the strides of ``layout``; no copy if only the strides differ.

    An axis of size 1 counts as contiguous with any stride, but ATen's batch norm infers the layout from the strides,
    and with unusual ones it may choose a path that rounds each step of a sum in half precision.
    """
    x = x.contiguous(memory_format=layout)
    if 1 not in x.shape:
        return x
    axes = range(x.dim()) if layout == torch.contiguous_format else (0, *range(2, x.dim()), 1)
    strides, step = [0] * x.dim(), 1
    for axis in reversed(axes):
        strides[axis] = step
        step *= x.size(axis)
    return x.as_strided(x.shape, strides)
