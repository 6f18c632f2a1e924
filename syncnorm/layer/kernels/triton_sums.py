"""The forward's sum over ranks, which replaces the gather in large groups: its row, and the moments from the sum.

Everything is as in ``global_sums``, which has the formulas and their reasons; ``triton_forward.pack_moments`` writes
the row. Products of halves are exact, so it makes no difference where the compiler fuses them with an addition.

Shapes: C = channels.
"""

import triton
import triton.language as tl
from torch import Tensor

from syncnorm.layer.kernels.launch import launch
from syncnorm.layer.kernels.tiles import cdiv, power_of_2
from syncnorm.layer.kernels.triton_merged import outputs, running_arguments, store_merged
from syncnorm.layer.moments import Running

_CHANNELS_PER_PROGRAM = 128


@triton.jit
def store_sums(row, count, mean, m2, tag, channel, C):
    """Writes ``[n | n m (C) | n c^2 (C) | n (var + m^2 - c^2) (C) | tag]``, fp64.

    Args:
        row: (3C + 2).
        count: values per channel, fp32.
        mean: of these values, fp32.
        m2: the sum of their squared deviations from the mean, fp32.
        tag: identifies the call.
        channel: those of this program.
        C: their number in all programs.
    """
    exists = channel < C
    n, m = count.to(tl.float64), mean.to(tl.float64)
    first_12_bits = mean.to(tl.int32, bitcast=True) & -4096
    c = first_12_bits.to(tl.float32, bitcast=True).to(tl.float64)
    tl.store(row + 1 + channel, n * m, mask=exists)
    tl.store(row + 1 + C + channel, n * (c * c), mask=exists)
    tl.store(row + 1 + 2 * C + channel, n * (m * m - c * c) + m2, mask=exists)
    tl.store(row + channel, n, mask=channel == 0)
    tl.store(row + 1 + 3 * C + channel, tl.full(channel.shape, 1.0, tl.float64) * tag, mask=channel == 0)


def merge_sums(
    summed: Tensor, eps: float, tag_sum: float, mismatch: Tensor, number: int, running: Running | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As ``global_sums.from_sums``, in one launch.

    Args:
        summed: (3C + 2), fp64, the sum of the rows of all ranks.
        eps: added to the variance.
        tag_sum: the sum of the tags if all ranks make this call; exact in fp32.
        mismatch: (), int64, in memory that the host can read without waiting.
        number: of the call.
        running: the running statistics to update, of fp32 or less, or None.

    Returns:
        ``mean (C), invstd (C), biased variance (C), count ()``, the count in fp64, the others in fp32.
    """
    C = (summed.numel() - 2) // 3
    found = outputs(C, summed.device)
    tile_C = min(power_of_2(C), _CHANNELS_PER_PROGRAM)
    launch(
        _merge_sums_kernel, (cdiv(C, tile_C), 1),
        summed, eps, tag_sum, *found, mismatch, number, *running_arguments(running, summed.device), C, tile_C,
    )  # fmt: skip
    return found


@triton.jit(do_not_specialize=["number", "C"])
def _merge_sums_kernel(
    summed, eps, tag_sum, mean, invstd, var, count, mismatch, number,
    running_mean, running_var, tracked, momentum, arrived, C, tile_C: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(0) * tile_C + tl.arange(0, tile_C)
    exists = channel < C
    total = tl.load(summed)
    in_step = tl.load(summed + 1 + 3 * C) == tag_sum
    sum_m = tl.load(summed + 1 + channel, mask=exists, other=0.0)
    sum_c2 = tl.load(summed + 1 + C + channel, mask=exists, other=0.0)
    sum_rest = tl.load(summed + 1 + 2 * C + channel, mask=exists, other=0.0)

    n = tl.maximum(total, 1.0)
    n_hi, m_hi, c_hi = _upper_half(n), _upper_half(sum_m), _upper_half(sum_c2)
    n_lo, m_lo, c_lo = n - n_hi, sum_m - m_hi, sum_c2 - c_hi
    upper = n_hi * c_hi - m_hi * m_hi
    lower = n_hi * c_lo + n_lo * c_hi - 2 * (m_hi * m_lo) + (n_lo * c_lo - m_lo * m_lo)
    var_eps = (upper + n * sum_rest + lower) / n / n + eps
    store_merged(
        sum_m / n, var_eps, total, in_step, eps, mean, invstd, var, count, mismatch, number,
        running_mean, running_var, tracked, momentum, arrived, channel, exists,
    )  # fmt: skip


@triton.jit
def _upper_half(x):
    """The first 26 bits of an fp64 value; the difference has the other 27."""
    return (x.to(tl.int64, bitcast=True) & -134217728).to(tl.float64, bitcast=True)
