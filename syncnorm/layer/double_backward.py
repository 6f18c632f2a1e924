"""The derivative of the backward: for gradient penalties and meta-learning.

The backward maps dy, x and weight w to, with xhat = (x - mean) * s and means M over the values of all ranks,

    dx = w s (dy - M[dy] - xhat M[dy xhat]),    dw = sum(dy xhat),    db = sum(dy),

the last two on each rank for itself. Here are the derivatives of ``<v, dx> + <u, dw> + <t, db>`` summed over all
ranks, where mean and s, too, are functions of every rank's x: d s / d x_j = -s^2 xhat_j / N.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from syncnorm import comm
from syncnorm.layer.moments import Count


def double_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    sum_dy: Tensor,
    sum_dy_xmu: Tensor,
    count: Count,
    v: Tensor | None,
    u: Tensor | None,
    t: Tensor | None,
    group: dist.ProcessGroup | None,
    layer: str,
    number: int,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Derivatives with respect to dy, x and weight, in the dtypes of these.

    Args:
        dy: (batch, C, *spatial), what the backward was given on this rank.
        x: of the same shape, what the forward was given.
        weight: (C) or None.
        mean: (C), of all ranks, in the statistics' dtype.
        invstd: (C), likewise; s above.
        sum_dy: (C), over all ranks.
        sum_dy_xmu: (C), over all ranks.
        count: values a channel over all ranks; N above.
        v: like x, the cotangent of dx, or None for zero.
        u: (C), that of this rank's dw.
        t: (C), that of this rank's db.
        group: all of its ranks must call; None is this process alone.
        layer: its name.
        number: of the forward.

    Collective: one all_reduce of 5C.
    """
    dims = [d for d in range(x.dim()) if d != 1]
    shape = (-1, *(1,) * (x.dim() - 2))
    s, w = invstd, invstd.new_ones(()) if weight is None else weight.to(invstd.dtype)
    u, t = (invstd.new_zeros(invstd.shape) if c is None else c.to(invstd.dtype) for c in (u, t))
    dy_, v_ = dy.to(invstd.dtype), (torch.zeros_like(x) if v is None else v).to(invstd.dtype)
    xhat = (x - mean.view(shape)) * s.view(shape)

    local_v, local_vx, local_vdy = v_.sum(dims), (v_ * xhat).sum(dims), (v_ * dy_).sum(dims)
    # u differs by rank, so what it weighs is summed after the weighing
    local = [local_v, local_vx, local_vdy, u * dy_.sum(dims), u * (dy_ * xhat).sum(dims)]
    with comm.reduce_sums(local, group, layer, number, comm.Kind.DOUBLE_BACKWARD) as finish:
        mean_v, mean_vx, mean_vdy, mean_udy, mean_udyx = (total / count for total in finish())
    mean_dy, mean_dyx = sum_dy / count, sum_dy_xmu * s / count

    def per_channel(vector: Tensor) -> Tensor:
        return vector.expand_as(mean).view(shape)

    d_dy = per_channel(w * s) * (v_ - per_channel(mean_v) - xhat * per_channel(mean_vx))
    d_dy = d_dy + per_channel(u) * xhat + per_channel(t)

    # through xhat as in any batch norm's backward, h being what reaches xhat ...
    h = per_channel(u - w * s * mean_vx) * dy_ - per_channel(w * s * mean_dyx) * v_
    mean_h = mean_udy - w * s * (mean_v * mean_dyx + mean_vx * mean_dy)
    mean_hx = mean_udyx - 2 * w * s * mean_vx * mean_dyx
    # ... and through the factor s of dx
    slope = s * mean_hx + w * s.square() * (mean_vdy - mean_v * mean_dy - mean_vx * mean_dyx)
    d_x = per_channel(s) * (h - per_channel(mean_h)) - per_channel(slope) * xhat

    d_weight = None
    if weight is not None:
        # this rank's part, like the first derivative
        d_weight = (s * (local_vdy - mean_dy * local_v - mean_dyx * local_vx)).to(weight.dtype)
    return d_dy.to(dy.dtype), d_x.to(x.dtype), d_weight
