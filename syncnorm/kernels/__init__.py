"""The four passes over a tensor that a synced batch norm is made of.

Each device's module has the same four functions. ``x`` and ``dy`` are dense in one memory format
(:func:`dense`) and not empty; vectors are (C) in the statistics' dtype.

- ``local_moments(x, eps) -> mean, invstd``: of this rank's values
- ``normalise(x, mean, invstd, weight, bias, eps) -> y``: y in x's dtype and memory format
- ``reduce_grad(dy, x, mean, invstd, weight) -> sum_dy, sum_dy_xmu``: over this rank's values
- ``apply_grad(dy, x, mean, invstd, weight, sum_dy, sum_dy_xmu, count) -> dx``: dx like x; the sums and the
  count (1) are those of all ranks
"""

from types import ModuleType

import torch
from torch import Tensor

from syncnorm.kernels import cpu, cuda


def for_device(device: torch.device) -> ModuleType:
    """The module of passes for a device; plain ATen (``cpu``) wherever there is nothing better."""
    return cuda if device.type == "cuda" else cpu


def dense(x: Tensor) -> Tensor:
    """``x`` without gaps or overlaps, in the memory format that its strides suggest; no copy if it is so."""
    return x.contiguous(memory_format=memory_format(x))


def memory_format(x: Tensor) -> torch.memory_format:
    """channels_last(_3d) where the channel is the fastest axis of a 4-D or 5-D tensor, else contiguous."""
    if x.dim() in (4, 5) and x.stride(1) == 1 and not x.is_contiguous():
        return torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    return torch.contiguous_format
