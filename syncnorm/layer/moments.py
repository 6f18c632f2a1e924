"""Count, mean and variance of the global batch from those of its parts. Pure tensor math, no communication.

Shapes: W = ranks of the group, C = channels.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

Count: TypeAlias = int | Tensor  # values per channel; a tensor () where the host would have to wait for the device


class Running(NamedTuple):
    """The running statistics of a layer, and how they are updated.

    Attributes:
        mean: (C), any floating dtype.
        var: (C), likewise; unbiased over the global batch.
        num_batches_tracked: int64 scalar, or None for a layer that does not count batches.
        momentum: weight of a new batch; None for the cumulative average, 1 / num_batches_tracked.
    """

    mean: Tensor
    var: Tensor
    num_batches_tracked: Tensor | None
    momentum: float | None


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which statistics of an input of ``dtype`` are computed, sent and merged."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def merge(moments_W2C: Tensor, counts: Sequence[int] | Tensor, eps: float) -> tuple[Tensor, Tensor, Count]:
    """Moments of the union of W batches, from the moments of each.

    A count of zero gives a batch no weight, so an empty rank needs no mask, no indexing and on a GPU no host sync.
    It computes in fp64: counts are exact to 2**53 and products do not round, so the merged mean is right to half a
    unit in the last place of fp32, which matters if the mean is far above the standard deviation.

    Args:
        moments_W2C: (W, 2C): the mean of each batch, then its ``1 / sqrt(biased variance + eps)``, finite for an
            empty one.
        counts: values per channel in each batch; a tensor (W, 1) if only the device knows them.
        eps: as in the formula above.

    Returns:
        ``(mean (C), biased variance + eps (C), count)``, the tensors in fp64; mean and variance are zero if all W
        batches are empty. The count is an int, or a tensor () if ``counts`` is a tensor.

    The variance is right to fp32 rounding of (variance + eps), which is the precision of ``invstd``.

    Source: Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances"
    (1979), in the form for W sets at once.
    """
    mean_WC, invstd_WC = moments_W2C.to(torch.float64, copy=True).chunk(2, dim=1)
    var_eps_WC = invstd_WC.pow_(-2)
    count: Count
    if isinstance(counts, Tensor):
        counts = counts.double()
        count = counts.sum()
        share_W1 = counts / count.clamp(min=1)
    else:
        count = sum(counts)
        share_W1 = mean_WC.new_tensor([[n / max(count, 1)] for n in counts])
    mean = _sum_in_order(mean_WC * share_W1)
    var_eps = _sum_in_order(var_eps_WC.add_(mean_WC.sub_(mean).square_()).mul_(share_W1))
    # A rounded invstd turns var = 0 into +-1e-7 * eps; a negative variance must not reach a buffer.
    return mean, var_eps.clamp_(min=eps), count


def count_column(counts: Sequence[Count], like: Tensor) -> Tensor:
    """Counts as :func:`merge` takes those that only a device knows: (W, 1), on the device of ``like``."""
    # A fill is a kernel, while a copy of host memory would wait for a GPU.
    rows = [n.to(like).view(1, 1) if isinstance(n, Tensor) else like.new_full((1, 1), n) for n in counts]
    return torch.cat(rows)


def _sum_in_order(rows_WC: Tensor) -> Tensor:
    """The sum of the rows; on the CPU in rank order, as in C, so that ranks with and without C have the same bits."""
    return functools.reduce(torch.add, rows_WC.unbind(0)) if rows_WC.device.type == "cpu" else rows_WC.sum(0)


def update_running_(
    running: Running, mean: Tensor, var: Tensor, count: Count, moves: bool = True, counts: bool = True
) -> None:
    """Updates the running statistics with those of a batch, in place; an empty batch changes nothing.

    The running variance is unbiased over the global batch: ``var * N / (N - 1)``.

    Args:
        running: updated in fp32 or its own dtype, whichever is wider. ``num_batches_tracked`` is incremented, and
            must not be None for the cumulative average.
        mean: (C), of the global batch.
        var: (C), biased.
        count: values per channel in the global batch.
        moves: False if mean and variance already include this batch.
        counts: False if ``num_batches_tracked`` does.
    """
    if isinstance(count, int) and count == 0:
        return
    num_batches_tracked = running.num_batches_tracked
    if counts and num_batches_tracked is not None:
        num_batches_tracked.add_(count > 0 if isinstance(count, Tensor) else 1)
    if not moves:
        return
    factor: float | Tensor
    if running.momentum is None:
        assert num_batches_tracked is not None
        factor = num_batches_tracked.clamp(min=1).double().reciprocal()
    else:
        factor = running.momentum
    if isinstance(count, Tensor):
        factor = (count > 0).double() * factor
        bessel: float | Tensor = count / (count - 1).clamp(min=1)
    else:
        bessel = count / max(count - 1, 1)
    # On the CPU ranks with and without the C code must agree in all bits.
    blend_ = _blend_ if isinstance(count, Tensor) or mean.device.type != "cpu" else _blend_as_in_c_
    blend_(running.mean, mean, factor)
    blend_(running.var, var * bessel if blend_ is _blend_ else var.double() * bessel, factor)


def _blend_(running: Tensor, value: Tensor, factor: float | Tensor) -> None:
    """Running <- (1 - factor) * running + factor * value."""
    wide = running if running.dtype in (torch.float32, torch.float64) else running.float()
    value = value.to(wide.dtype)
    if isinstance(factor, Tensor):  # fp64, since 0.1 rounded to fp32 would show in an fp64 buffer
        factor = factor.to(wide.dtype)
        value = torch.where(factor > 0, value, wide)  # zero times NaN would be NaN
    wide.lerp_(value, factor)
    if wide is not running:
        running.copy_(wide)


def _blend_as_in_c_(running: Tensor, value: Tensor, factor: float | Tensor) -> None:
    """The same in the operations of merge.c, one by one."""
    old, target = running.double(), value.double()
    step = target - old
    if isinstance(factor, Tensor):
        running.copy_(torch.where(factor < 0.5, old + step * factor, target - step * (1 - factor)))
    else:
        running.copy_(old + step * factor if factor < 0.5 else target - step * (1 - factor))
