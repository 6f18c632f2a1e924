"""The passes in plain ATen: written for the CPU, right on any device.

torch has no CPU kernels behind its SyncBatchNorm, so these are put together from operators that it has.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from syncnorm.moments import statistics_dtype


def local_moments(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and invstd, each (C), of one rank's values."""
    return _moments(x, eps, x.numel() // x.size(1), None)


def masked_moments(x: Tensor, eps: float, padding: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`local_moments` of the positions that are no padding, and their count; on any device.

    Args:
        x: (batch, C, *spatial), zero where ``padding`` is True.
        eps: as there.
        padding: (batch, 1, *spatial), boolean.

    Returns:
        ``(mean (C), invstd (C), count ())``; finite where the count is zero.
    """
    valid = padding.logical_not().sum()
    return *_moments(x, eps, valid.clamp(min=1), padding), valid


def _moments(x: Tensor, eps: float, count: int | Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor]:
    """The corrected two-pass algorithm.

    E[x^2] - E[x]^2 would lose everything where the mean is far above the standard deviation. ``sum`` adds up in a
    cascade, so the error does not grow with the count.

    Source: Chan, Golub, LeVeque, "Algorithms for computing the sample variance" (1983), equation 1.7.
    """
    dims = [d for d in range(x.dim()) if d != 1]
    mean = x.sum(dims, dtype=statistics_dtype(x.dtype)) / count
    centred = x - per_channel(mean, x)
    if padding is not None:
        centred.masked_fill_(padding, 0)
    residual = centred.sum(dims) / count
    var = centred.square_().sum(dims) / count - residual.square()
    return mean + residual, torch.rsqrt(var + eps)


def normalise(
    x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """``(x - mean) * invstd * weight + bias`` in one pass."""
    # batch_norm in eval mode is that pass: unit variance and no epsilon leave the factor to the weight.
    return F.batch_norm(x, mean, torch.ones_like(mean), _scale(invstd, weight), _as(bias, mean), eps=0.0)


def reduce_grad(dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor) -> tuple[Tensor, Tensor]:
    """``sum(dy)`` and ``sum(dy * (x - mean))``, each (C), in one pass."""
    # The eval-mode backward sums dy * (x - mean) / sqrt(var + eps) for the weight, and dy for the bias.
    _, sum_dy_xmu, sum_dy = torch.ops.aten.native_batch_norm_backward(
        dy, x, None, mean, torch.ones_like(mean), None, None, False, 0.0, [False, True, True]
    )
    return sum_dy, sum_dy_xmu


def apply_grad(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    sum_dy: Tensor,
    sum_dy_xmu: Tensor,
    count: Tensor,
) -> Tensor:
    """``weight * invstd * (dy - sum_dy / N - (x - mean) * invstd^2 * sum_dy_xmu / N)`` as a * dy - b * x + c."""
    a = _scale(invstd, weight)
    slope = invstd.square() * (sum_dy_xmu / count)
    b = a * slope
    c = a * (mean * slope - sum_dy / count)
    # Half precision is computed in fp32 (by type promotion) and rounded once, at the end.
    dx = torch.addcmul(per_channel(c, x), dy, per_channel(a, x))
    return dx.addcmul_(x, per_channel(b, x), value=-1).to(x.dtype)


def _scale(invstd: Tensor, weight: Tensor | None) -> Tensor:
    return invstd if weight is None else invstd * weight.to(invstd.dtype)


def _as(vector: Tensor | None, like: Tensor) -> Tensor | None:
    return None if vector is None else vector.to(like.dtype)


def per_channel(vector: Tensor, x: Tensor) -> Tensor:
    """(C) -> (1, C, 1, ...), to broadcast over x."""
    return vector.view(-1, *(1,) * (x.dim() - 2))
