"""What the merge of all ranks writes, whether it merges gathered rows or one sum: the end of both Triton kernels."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from syncnorm.layer.kernels.parts import is_last, semaphores
from syncnorm.layer.moments import Running


def outputs(C: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Memory for ``mean (C), invstd (C), biased variance (C)``, fp32, and ``count ()``, fp64."""
    mean, invstd, var = torch.empty(3, C, dtype=torch.float32, device=device)
    return mean, invstd, var, torch.empty((), dtype=torch.float64, device=device)


def running_arguments(
    running: Running | None, device: torch.device
) -> tuple[Tensor | None, Tensor | None, Tensor | None, float, Tensor | None]:
    """The arguments of :func:`store_merged` about running statistics: mean, var, tracked, momentum, arrived."""
    mean, var, tracked, momentum = running or (None, None, None, 0.0)
    # The cumulative average, of which all programs need the number of batches before one of them counts up.
    arrived = semaphores(1, device) if momentum is None else None
    return mean, var, tracked, float(momentum or 0.0), arrived


@triton.jit
def store_merged(
    merged, var_eps, total, in_step, eps, mean, invstd, var, count, mismatch, number,
    running_mean, running_var, tracked, momentum, arrived, channel, exists,
):  # fmt: skip
    """Writes the statistics of the global batch, and moves running statistics.

    Args:
        merged: the mean of each channel of this program, fp64.
        var_eps: the biased variance of each channel plus eps, fp64.
        total: values per channel in the global batch, fp64.
        in_step: whether all ranks sent the tag of this call. If not, statistics are NaN, running ones stay, and
            ``number`` is stored in ``mismatch``.
    """
    # From here on in fp32, as in moments.merge and update_running_.
    nan = float("nan")
    merged = merged.to(tl.float32)
    wide = tl.where(var_eps < eps, eps, var_eps).to(tl.float32)
    tl.store(mean + channel, tl.where(in_step, merged, nan), mask=exists)
    tl.store(invstd + channel, tl.where(in_step, tl.div_rn(1.0, tl.sqrt_rn(wide)), nan), mask=exists)
    tl.store(var + channel, tl.where(in_step, wide - eps, nan), mask=exists)
    counts = in_step & (total > 0)
    counts_up = tl.program_id(0) == 0
    if running_mean is not None:
        factor = momentum
        if arrived is not None:
            seen = tl.load(tracked) + 1
            factor = (1.0 / seen.to(tl.float64)).to(tl.float32)
            counts_up = is_last(arrived, tl.num_programs(0))
        factor = tl.where(counts, factor, 0.0)
        unbiased = ((wide - eps).to(tl.float64) * (total / tl.maximum(total - 1, 1.0))).to(tl.float32)
        _blend(running_mean + channel, merged, factor, exists)
        _blend(running_var + channel, unbiased, factor, exists)
    if counts_up:
        tl.store(count, tl.where(in_step, total, nan))
        if tracked is not None:
            tl.store(tracked, tl.load(tracked) + counts.to(tl.int64))
        if in_step == 0:
            tl.store(mismatch, number)


@triton.jit
def _blend(running, value, factor, exists):
    old = tl.load(running, mask=exists, other=0.0).to(tl.float32)
    # The two branches of torch.lerp: a factor of 1 gives exactly ``value``.
    new = tl.where(factor < 0.5, old + factor * (value - old), value - (value - old) * (1 - factor))
    # NaN times zero is NaN, and an empty batch must change nothing whatever its moments are.
    tl.store(running, tl.where(factor == 0, old, new).to(running.dtype.element_ty), mask=exists)
