"""The merge and the update of running statistics as one Triton kernel, instead of some 25 small operators."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from syncnorm.layer.moments import Running

_CHANNELS_PER_PROGRAM = 128


def supports(moments_W2C: Tensor, running: Running | None) -> bool:
    """Whether statistics are fp32, running ones fp32 or half, and the momentum is a number."""
    if moments_W2C.dtype != torch.float32:
        return False
    if running is None:
        return True
    narrow = {running.mean.dtype, running.var.dtype} <= {torch.float32, torch.bfloat16, torch.float16}
    dense = running.mean.stride(0) == running.var.stride(0) == 1
    return running.momentum is not None and narrow and dense


@triton.jit
def _merge_kernel(
    gathered, row, counts, count_row, eps, mean, invstd, var, count,
    running_mean, running_var, tracked, momentum, W, C,
    tile_C: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * tile_C + tl.arange(0, tile_C)
    inside = c < C
    total = tl.zeros((), tl.float64)
    for rank in range(W):
        total += tl.load(counts + rank * count_row).to(tl.float64)
    share = 1.0 / tl.maximum(total, 1.0)
    mean_c = tl.zeros((tile_C,), tl.float64)
    for rank in range(W):
        n = tl.load(counts + rank * count_row).to(tl.float64)
        mean_c += n * share * tl.load(gathered + rank * row + c, mask=inside, other=0.0).to(tl.float64)
    var_eps = tl.zeros((tile_C,), tl.float64)
    for rank in range(W):
        n = tl.load(counts + rank * count_row).to(tl.float64)
        deviation = tl.load(gathered + rank * row + c, mask=inside, other=0.0).to(tl.float64) - mean_c
        invstd_c = tl.load(gathered + rank * row + C + c, mask=inside, other=1.0).to(tl.float64)
        var_eps += n * share * (1.0 / (invstd_c * invstd_c) + deviation * deviation)
    # From here on in fp32, as in moments.merge and update_running_.
    merged = mean_c.to(tl.float32)
    wide = tl.where(var_eps < eps, eps, var_eps).to(tl.float32)
    unbiased = ((wide - eps).to(tl.float64) * (total / tl.maximum(total - 1, 1.0))).to(tl.float32)
    tl.store(mean + c, merged, mask=inside)
    tl.store(invstd + c, tl.div_rn(1.0, tl.sqrt_rn(wide)), mask=inside)
    tl.store(var + c, wide - eps, mask=inside)
    if running_mean is not None:
        factor = tl.where(total > 0, momentum, 0.0)
        _blend(running_mean + c, merged, factor, inside)
        _blend(running_var + c, unbiased, factor, inside)
    if tl.program_id(0) == 0:
        tl.store(count, total)
        if tracked is not None:
            tl.store(tracked, tl.load(tracked) + (total > 0).to(tl.int64))


@triton.jit
def _blend(running, value, factor, inside):
    old = tl.load(running, mask=inside, other=0.0).to(tl.float32)
    # The two branches of torch.lerp: a factor of 1 gives exactly ``value``.
    new = tl.where(factor < 0.5, old + factor * (value - old), value - (value - old) * (1 - factor))
    # NaN times zero is NaN, and an empty batch must change nothing whatever its moments are.
    tl.store(running, tl.where(factor == 0, old, new).to(running.dtype.element_ty), mask=inside)


def merge(
    moments_W2C: Tensor, counts: Tensor, eps: float, running: Running | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As ``kernels.cpu.merge``, for arguments that :func:`supports` accepts and counts (W, 1) on the device."""
    channels = moments_W2C.size(1) // 2
    mean, invstd, var = moments_W2C.new_empty(3, channels)
    count = moments_W2C.new_empty((), dtype=torch.float64)
    moving = (None, None, None, 0.0) if running is None else running
    _merge_kernel[(triton.cdiv(channels, _CHANNELS_PER_PROGRAM),)](
        moments_W2C, moments_W2C.stride(0), counts, counts.stride(0), eps, mean, invstd, var, count, *moving,
        moments_W2C.size(0), channels, _CHANNELS_PER_PROGRAM,
    )  # fmt: skip
    return mean, invstd, var, count
