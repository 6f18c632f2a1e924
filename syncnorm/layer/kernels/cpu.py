"""The passes in plain ATen: written for the CPU, right on any device.

torch's SyncBatchNorm has no CPU kernels, so these passes are composed of other operators, chosen for speed:
``batch_norm`` is fast if the values of a channel are adjacent, broadcasting is if the channel is the fastest axis,
and newly allocated memory is slow to write to.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from syncnorm.layer import moments
from syncnorm.layer.moments import Count, Running, statistics_dtype

_batch_norm_into = torch.ops.aten.native_batch_norm.out
_batch_norm_backward = torch.ops.aten.native_batch_norm_backward.default
_squared_distance_into = torch.ops.aten.mse_loss.out
_SMALL_VALUES = 2**16  # below, one operator takes less time than three faster ones
_PART_VALUES = 2**18  # a MiB of fp32
_FAR_STD = 2.0  # |mean| / std above which the two-pass variance needs a correction


def local_moments(x: Tensor, eps: float, scratch: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and invstd, each (C), of one rank's values, by the two-pass algorithm.

    Channels whose mean is so far from zero that its rounding error is not negligible compared with the standard
    deviation are corrected as in :func:`corrected_moments`.
    """
    dims = [d for d in range(x.dim()) if d != 1]
    wide = x.to(statistics_dtype(x.dtype))
    mean = wide.mean(dims)
    squares = _squared_distance_into(wide, per_channel(mean, x), 0, out=scratch if wide is x else wide)
    var = squares.mean(dims)
    invstd = torch.rsqrt(var + eps)
    margin = torch.addcmul(var, mean, mean, value=-(_FAR_STD**-2))
    if not margin.min() >= 0:  # also true if the minimum is NaN, which hides the other channels
        far = margin.less(0).nonzero().squeeze(1)
        if far.numel() > 0:
            mean[far], invstd[far] = corrected_moments(x.index_select(1, far), eps)
    return mean, invstd


def corrected_moments(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and invstd, right to the last place however far the mean is from zero."""
    return _corrected(x, eps, x.numel() // x.size(1), None)


def masked_moments(x: Tensor, eps: float, padding: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`local_moments` of the positions that are not padding, and their count; on any device.

    Args:
        x: (batch, C, *spatial), zero where ``padding`` is True.
        eps: added to the variance.
        padding: (batch, 1, *spatial), boolean.

    Returns:
        ``(mean (C), invstd (C), count ())``; finite if the count is zero.
    """
    valid = padding.logical_not().sum()
    return *_corrected(x, eps, valid.clamp(min=1), padding), valid


def _corrected(x: Tensor, eps: float, count: Count, padding: Tensor | None) -> tuple[Tensor, Tensor]:
    """The corrected two-pass algorithm.

    E[x^2] - E[x]^2 would cancel if the mean is far above the standard deviation. The error of ``sum``, which adds
    pairwise, does not grow with the count, and the second pass corrects the rounding error of the mean.

    Source: Chan, Golub, LeVeque, "Algorithms for computing the sample variance" (1983), equation 1.7.
    """
    dims = [d for d in range(x.dim()) if d != 1]
    mean = x.sum(dims, dtype=statistics_dtype(x.dtype)) / count
    centered = x - per_channel(mean, x)
    if padding is not None:
        centered.masked_fill_(padding, 0)
    residual = centered.sum(dims) / count
    var = centered.square_().sum(dims) / count - residual.square()
    return mean + residual, torch.rsqrt(var + eps)


def merge(
    moments_W2C: Tensor, counts: Sequence[int] | Tensor, eps: float, running: Running | None
) -> tuple[Tensor, Tensor, Tensor, Count]:
    """``moments.merge`` and ``moments.update_running_``; the results have the dtype of ``moments_W2C``."""
    mean, var_eps, count = moments.merge(moments_W2C, counts, eps)
    mean, var_eps = mean.to(moments_W2C.dtype), var_eps.to(moments_W2C.dtype)
    invstd, var = var_eps.rsqrt(), var_eps.sub_(eps)
    if running is not None:
        moments.update_running_(running, mean, var, count)
    return mean, invstd, var, count


def normalize(
    x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, bias: Tensor | None, y: Tensor
) -> Tensor:
    """``(x - mean) * invstd * weight + bias`` in one pass."""
    scale, shift = _scale(invstd, weight), cast_like(bias, mean)
    if _channel_is_fastest(x) and x.dtype == mean.dtype and x.numel() > _SMALL_VALUES:
        offset = torch.addcmul(torch.zeros_like(mean) if shift is None else shift, mean, scale, value=-1)
        return torch.addcmul(per_channel(offset, x), x, per_channel(scale, x), out=y)
    # batch_norm in eval mode, with unit variance, no epsilon and ``scale`` as its weight, is this pass.
    none = mean.new_empty(0)
    _batch_norm_into(
        x, scale, shift, mean, torch.ones_like(mean), False, 0.0, 0.0, out=y, save_mean=none, save_invstd=none
    )
    return y


def reduce_grad(dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor) -> tuple[Tensor, Tensor]:
    """``sum(dy)`` and ``sum(dy * (x - mean))``, each (C), in one pass."""
    # The eval-mode backward sums dy * (x - mean) / sqrt(var + eps) for the weight, and dy for the bias.
    _, sum_dy_xmu, sum_dy = _batch_norm_backward(
        dy, x, None, mean, torch.ones_like(mean), None, None, False, 0.0, [False, True, True]
    )
    return sum_dy, sum_dy_xmu


def begin_grad(dy: Tensor, invstd: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """``weight * invstd * dy``, or ``dy`` if the last pass multiplies; and the factors (C) of dx."""
    scale = _scale(invstd, weight)
    slope = torch.mul(scale, invstd).mul_(invstd)
    in_last_pass = _channel_is_fastest(dy) or dy.dtype != scale.dtype
    return dy if in_last_pass else dy * per_channel(scale, dy), scale, slope


def finish_grad(
    begun: tuple[Tensor, Tensor, Tensor],
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    sum_dy: Tensor,
    sum_dy_xmu: Tensor,
    count: Count,
) -> Tensor:
    """``weight * invstd * (dy - sum_dy / N - (x - mean) * invstd^2 * sum_dy_xmu / N)``, a * dy + (c - b * x) / N."""
    dx, a, slope = begun
    per_value = 1.0
    if isinstance(count, Tensor):
        sum_dy, sum_dy_xmu = sum_dy / count, sum_dy_xmu / count
    else:
        per_value = 1 / max(count, 1)
    b = slope * sum_dy_xmu
    c = torch.mul(mean, b).addcmul_(a, sum_dy, value=-1)
    if x.dtype != mean.dtype:
        return _in_parts(dx, x, a, b.mul_(-per_value), c.mul_(per_value))
    if _channel_is_fastest(x):
        dx = torch.addcmul(per_channel(c.mul_(per_value), x), dx, per_channel(a, x))
    else:
        dx.add_(per_channel(c, x), alpha=per_value)
    return dx.addcmul_(x, per_channel(b, x), value=-per_value)


def _in_parts(dy: Tensor, x: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """``a * dy + b * x + c`` for half precision, computed in fp32 and rounded once, in parts that fit in the cache.

    Operators on mixed dtypes are slower than copies, and fp32 copies of the whole tensors would need more memory.
    """
    dx = torch.empty_like(x)
    parts = list(zip(_parts(dx), _parts(dy), _parts(x), strict=True))
    largest = parts[0][0].numel()  # more than _PART_VALUES if one position of all samples and channels is
    wide = [torch.empty(largest, dtype=a.dtype, device=x.device) for _ in range(2)]
    for dx_part, dy_part, x_part in parts:
        dy_wide, x_wide = (
            w[: part.numel()].view(part.shape).copy_(part) for w, part in zip(wide, (dy_part, x_part), strict=True)
        )
        dy_wide.mul_(per_channel(a, dy_wide)).add_(per_channel(c, dy_wide))
        dx_part.copy_(dy_wide.addcmul_(x_wide, per_channel(b, x_wide)))
    return dx


def _parts(x: Tensor) -> tuple[Tensor, ...]:
    """Views of about ``_PART_VALUES`` values or less: (n, C) if the channel is the fastest axis, else (N, C, n)."""
    if x.dim() > 2:
        x = x.movedim(1, -1).flatten(0, -2) if _channel_is_fastest(x) else x.flatten(2)
    axis = 0 if x.dim() == 2 else 2
    return torch.split(x, max(1, _PART_VALUES * x.size(axis) // x.numel()), axis)


def _channel_is_fastest(x: Tensor) -> bool:
    return x.stride(1) == 1 and x.size(1) > 1


def _scale(invstd: Tensor, weight: Tensor | None) -> Tensor:
    return invstd if weight is None else invstd * weight.to(invstd.dtype)


def cast_like(vector: Tensor | None, like: Tensor) -> Tensor | None:
    """``vector`` in the dtype of ``like``."""
    return vector if vector is None or vector.dtype == like.dtype else vector.to(like.dtype)


def per_channel(vector: Tensor, x: Tensor) -> Tensor:
    """(C) -> (1, C, 1, ...), to broadcast over x."""
    return vector if x.dim() == 2 else vector.view(-1, *(1,) * (x.dim() - 2))
