"""The moments of the global batch from one sum over all ranks, instead of a gather. Pure tensor math.

A gather brings W rows to every rank, a sum brings one whatever W is, so in a group of many ranks it costs less.
What can be summed is the count, the mean and the mean square of each rank, and the variance is then a difference of
two numbers that agree in most digits if the mean is far above the standard deviation. Two measures keep those digits,
so that the result has the accuracy of ``moments.merge``:

- Sums are in fp64.
- The square of a mean m is summed in two parts, c^2 and m^2 - c^2, where c has the first 12 bits of m. The sums of m
  and c^2 are exact for up to 2^28 values per channel; only the sum of m^2 - c^2, at most 2^-10 of m^2, is rounded.

No shift is subtracted from the means. One that all ranks share could only be a running mean, and a running mean that
is far off, not finite, or not the same on all ranks would then change the statistics of a batch.

Shapes: C = channels, W = ranks of the group. A row is ``[n | n m (C) | n c^2 (C) | n (var + m^2 - c^2) (C) | tag]``.
"""

import torch
from torch import Tensor

from syncnorm.layer import moments
from syncnorm.layer.moments import Count, Running


def pack_sums_of_moments(mean: Tensor, invstd: Tensor, count: Count, eps: float, tag: float) -> Tensor:
    """What this rank adds to the sum.

    Args:
        mean: (C) of this rank's batch, fp32, which is 24 bits: wider means would not be summed exactly.
        invstd: (C), ``1 / sqrt(biased variance + eps)``, fp32. Like ``mean`` finite for an empty batch.
        count: values per channel in this rank's batch.
        eps: as in the formula above.
        tag: a whole number that identifies the call. All ranks use the same one if they make the same call.

    Returns:
        The row (3C + 2), fp64.
    """
    m, c = mean.double(), first_12_bits(mean).double()
    n = count.double().view(1) if isinstance(count, Tensor) else m.new_full((1,), count)
    var = invstd.double().pow(-2) - eps
    return torch.cat([n, n * m, n * (c * c), n * (var + (m * m - c * c)), m.new_full((1,), tag)])


def from_sums(
    summed: Tensor, eps: float, tag_sum: float, mismatch: Tensor, number: int, running: Running | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The moments of the global batch, from the sum of the rows of all ranks; updates ``running``.

    If the sum of the tags is wrong, the ranks made different calls: the results are NaN, ``running`` stays as it is,
    and ``number`` is written to ``mismatch``. The host waits for nothing.

    Args:
        summed: (3C + 2), the sum over all ranks of :func:`pack_sums_of_moments`.
        eps: as there.
        tag_sum: the sum of the tags if all ranks make this call.
        mismatch: int64 (), on the device of ``summed`` or in pinned memory.
        number: of this call.
        running: the running statistics to update, or None.

    Returns:
        ``(mean (C), invstd (C), biased variance (C), count ())``, the count in fp64 and the others in fp32; mean and
        variance are zero if the batches of all ranks are empty.
    """
    count, (sum_m, sum_c2, sum_rest) = summed[0], summed[1:-1].view(3, -1).unbind(0)
    mean, var_eps = (v.float() for v in _mean_and_variance(count, sum_m, sum_c2, sum_rest, eps))
    invstd, var = var_eps.rsqrt(), var_eps - eps
    wrong = summed[-1] != tag_sum
    reported = mismatch.to(summed.device, non_blocking=True)
    mismatch.copy_(torch.where(wrong, number, reported), non_blocking=True)
    if running is not None:
        # As for an empty batch, and with finite values, because zero times NaN is NaN.
        values = [v.masked_fill(wrong, 0) for v in (mean, var, count)]
        moments.update_running_(running, values[0], values[1], values[2])
    mean, invstd, var, count = (v.masked_fill(wrong, torch.nan) for v in (mean, invstd, var, count))
    return mean, invstd, var, count


def _mean_and_variance(
    n: Tensor, sum_m: Tensor, sum_c2: Tensor, sum_rest: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The mean and (biased variance + eps), both (C) in fp64, from a summed row without its tag.

    Their formula is ``n^2 var = n sum_c2 - sum_m^2 + n sum_rest``. The first two terms are multiplied by halves: the
    products of the upper halves are exact, and so is their difference where it cancels.
    """
    n = n.clamp(min=1)
    (n_hi, n_lo), (m_hi, m_lo), (c_hi, c_lo) = (_halves(v) for v in (n, sum_m, sum_c2))
    upper = n_hi * c_hi - m_hi * m_hi
    lower = n_hi * c_lo + n_lo * c_hi - 2 * (m_hi * m_lo) + (n_lo * c_lo - m_lo * m_lo)
    var = (upper + n * sum_rest + lower) / n / n
    return sum_m / n, (var + eps).clamp(min=eps)


def first_12_bits(x: Tensor) -> Tensor:
    """``x``, fp32, rounded toward zero to 12 significant bits: its square has 24."""
    return (x.view(torch.int32) & -(2**12)).view(torch.float32)


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x``, fp64, as the sum of its first 26 bits and the other 27."""
    upper = (x.view(torch.int64) & -(2**27)).view(torch.float64)
    return upper, x - upper
