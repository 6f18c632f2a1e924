"""The four passes over a tensor that a synced batch norm is made of, and the merging between them.

Each device's module has the same functions. ``x`` and ``dy`` are dense in one memory format
(:func:`dense`) and not empty; vectors are (C) in the statistics' dtype.

- ``local_moments(x, eps, scratch) -> mean, invstd``: of this rank's values; ``scratch``, like x, may be overwritten
- ``merge(gathered_WP, counts, eps, running) -> mean, invstd, var, count``: what all ranks' moments (W, 2C) make
  together; moves the running statistics
- ``normalise(x, mean, invstd, weight, bias, y) -> y``: into ``y``, like x, or into memory of its own
- ``reduce_grad(dy, x, mean, invstd) -> sum_dy, sum_dy_xmu``: over this rank's values
- ``begin_grad(dy, invstd, weight) -> begun``: as much of dx as needs no other rank
- ``finish_grad(begun, x, mean, invstd, weight, sum_dy, sum_dy_xmu, count) -> dx``: dx like x; the sums and the
  count are those of all ranks; ``begun`` may be overwritten
"""

import functools
import importlib.util
import os
from types import ModuleType

import torch
from torch import Tensor

from syncnorm.layer.kernels import cpu, cuda
from syncnorm.layer.moments import Count, statistics_dtype


def for_device(device: torch.device) -> ModuleType:
    """The module of passes for a device; plain ATen (``cpu``) wherever there is nothing better."""
    return cuda if device.type == "cuda" else cpu


@functools.lru_cache
def fused_for(device: torch.device) -> ModuleType | None:
    """The passes with a ReLU and a shortcut in them; None where Triton is not there or does not know the device.

    Under ``TRITON_INTERPRET=1`` Triton knows the CPU, for tests.
    """
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return None
    if importlib.util.find_spec("triton") is None:
        return None
    from syncnorm.layer.kernels import triton_passes  # not at the top: it imports a compiler

    return triton_passes


def moments_of(x: Tensor, eps: float, scratch: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor, Count]:
    """``local_moments``, of an empty or padded x as well, and the count of values a channel.

    Padding is zero in x, as it will be in dy, and so changes no other sum.
    """
    if x.numel() == 0:  # an empty rank still takes part; its count takes its moments out of the merge
        mean = torch.zeros(x.size(1), dtype=statistics_dtype(x.dtype), device=x.device)
        return mean, torch.ones_like(mean), 0
    if padding is not None:
        return cpu.masked_moments(x, eps, padding)
    return *for_device(x.device).local_moments(x, eps, scratch), x.numel() // x.size(1)


def memory_format(x: Tensor) -> torch.memory_format:
    """channels_last(_3d) where the channel is the fastest axis of a 4-D or 5-D tensor, else contiguous."""
    if x.dim() in (4, 5) and x.stride(1) == 1 and not x.is_contiguous():
        return torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    return torch.contiguous_format


def dense(x: Tensor, layout: torch.memory_format) -> Tensor:
    """``x`` without gaps or overlaps, with the very strides of ``layout``; no copy if only they differ.

    An axis of size 1 may have any stride and still count as contiguous, but ATen's batch norm guesses the layout
    from the strides: sums of half precision then take a path that rounds each step.
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
