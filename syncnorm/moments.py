"""Count, mean and variance of a whole batch from those of its parts. Pure tensor maths, no communication.

Shapes: W = ranks of the group, C = channels.
"""

import torch
from torch import Tensor


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which statistics of an input of ``dtype`` are computed, travel and are merged."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def merge(mean_WC: Tensor, invstd_WC: Tensor, count_W1: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Moments of the union of W batches, from the moments of each.

    A count of zero takes a batch out by arithmetic alone, so an empty rank needs no mask, no indexing and
    on a GPU no host sync. fp64 inside: with counts exact to 2**53 and products that do not round, the merged
    mean is right to half a unit in the last place of fp32, which matters where the mean is far above the
    standard deviation.

    Args:
        mean_WC: mean of each batch.
        invstd_WC: ``1 / sqrt(biased variance + eps)`` of each batch; finite for an empty one.
        count_W1: values a channel in each batch, as a floating tensor.
        eps: the epsilon inside ``invstd_WC``.

    Returns:
        ``(mean (C), biased variance (C), count ())``, all fp64; zero mean and variance where all W are empty.

    The variance is right to fp32 rounding of (variance + eps), because that is what ``invstd`` carries.

    Source: Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances"
    (1979), in the form for W sets at once.
    """
    mean_WC, invstd_WC, count_W1 = mean_WC.double(), invstd_WC.double(), count_W1.double()
    var_WC = invstd_WC.pow(-2) - eps
    count = count_W1.sum()
    share_W1 = count_W1 / count.clamp(min=1)
    mean = (share_W1 * mean_WC).sum(0)
    var = (share_W1 * (var_WC + (mean_WC - mean).square())).sum(0)
    # var = 0 comes back from a rounded invstd as +-1e-7 * eps; a negative variance must not reach a buffer.
    return mean, var.clamp_(min=0), count


def update_running_(
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor | None,
    mean: Tensor,
    var: Tensor,
    count: Tensor,
    momentum: float | Tensor | None,
) -> None:
    """Moves the running statistics towards the batch's, in place; an empty batch moves nothing.

    The running variance is unbiased over the whole batch: ``var * N / (N - 1)``.

    Args:
        running_mean: (C), any floating dtype; blended in the wider of its dtype and fp32.
        running_var: (C), likewise.
        num_batches_tracked: int64 scalar, one more for a batch that is not empty.
        mean: (C), of the whole batch.
        var: (C), biased.
        count: (), values a channel in the whole batch.
        momentum: weight of the new batch; ``None`` for the cumulative average, 1 / num_batches_tracked, which
            must be given then.
    """
    seen = count > 0
    if num_batches_tracked is not None:
        num_batches_tracked.add_(seen)
    if momentum is None:
        assert num_batches_tracked is not None
        momentum = num_batches_tracked.clamp(min=1).double().reciprocal()
    factor = seen.double() * momentum  # fp64: 0.1 rounded to fp32 would show in an fp64 buffer
    _blend_(running_mean, mean, factor)
    _blend_(running_var, var * (count / (count - 1).clamp(min=1)), factor)


def _blend_(running: Tensor, value: Tensor, factor: Tensor) -> None:
    """Running <- (1 - factor) * running + factor * value."""
    dtype = torch.promote_types(running.dtype, torch.float32)
    blended = torch.lerp(running.to(dtype), value.to(dtype), factor.to(dtype))
    running.copy_(blended)
