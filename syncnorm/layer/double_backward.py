"""The derivative of the backward: for gradient penalties and meta-learning.

With xhat = (x - mean) * s, s = invstd, and M the mean over the values of all ranks, the backward maps dy, x and the
weight w to

    dx = w s (dy - M[dy] - xhat M[dy xhat]),    dw = sum(dy xhat),    db = sum(dy),

where dw and db are sums over one rank's values. This file has the derivatives of ``<v, dx> + <u, dw> + <t, db>``,
summed over all ranks; mean and s also depend on every rank's x: d s / d x_j = -s^2 xhat_j / N.
"""

import torch
from torch import Tensor

from syncnorm import comm
from syncnorm.errors import InputError
from syncnorm.layer.arguments import ForwardCall


def double_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    sum_dy: Tensor,
    sum_dy_xmu: Tensor,
    call: ForwardCall,
    v: Tensor | None,
    u: Tensor | None,
    t: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Derivatives with respect to dy, x and weight, in the dtypes of these.

    Args:
        dy: (batch, C, *spatial), the argument of this rank's backward.
        x: of the same shape, the argument of its forward.
        weight: (C) or None.
        mean: (C), of the global batch, in the statistics' dtype.
        invstd: (C), likewise; s above.
        sum_dy: (C), over all ranks.
        sum_dy_xmu: (C), over all ranks.
        call: the forward; its count is N above, and all ranks of its group must call.
        v: like x, the cotangent of dx; None for zero.
        u: (C), the cotangent of this rank's dw; None for zero.
        t: (C), the cotangent of this rank's db; None for zero.

    Raises:
        InputError: the forward was one of a window of micro-batches.

    Collective: one all_reduce of 5C.
    """
    if call.window is not None:
        raise InputError(
            f"{call.layer_name} has no second derivative while it accumulates statistics over micro-batches: its "
            f"statistics are not those of the present batch alone. For gradient penalties use "
            f"syncnorm.convert(model, accumulate=1)"
        )
    dims = [d for d in range(x.dim()) if d != 1]
    shape = (-1, *(1,) * (x.dim() - 2))
    s, w = invstd, invstd.new_ones(()) if weight is None else weight.to(invstd.dtype)
    u, t = (invstd.new_zeros(invstd.shape) if c is None else c.to(invstd.dtype) for c in (u, t))
    dy_, v_ = dy.to(invstd.dtype), (torch.zeros_like(x) if v is None else v).to(invstd.dtype)
    xhat = (x - mean.view(shape)) * s.view(shape)

    local_v, local_vx, local_vdy = v_.sum(dims), (v_ * xhat).sum(dims), (v_ * dy_).sum(dims)
    # u differs by rank: multiply before the sum over ranks.
    local = [local_v, local_vx, local_vdy, u * dy_.sum(dims), u * (dy_ * xhat).sum(dims)]
    with comm.reduce_sums(local, call.group, call.layer_name, call.number, comm.Kind.DOUBLE_BACKWARD) as finish:
        mean_v, mean_vx, mean_vdy, mean_udy, mean_udyx = (total / call.total_count for total in finish())
    mean_dy, mean_dyx = sum_dy / call.total_count, sum_dy_xmu * s / call.total_count

    def per_channel(vector: Tensor) -> Tensor:
        return vector.expand_as(mean).view(shape)

    d_dy = per_channel(w * s) * (v_ - per_channel(mean_v) - xhat * per_channel(mean_vx))
    d_dy = d_dy + per_channel(u) * xhat + per_channel(t)

    # Through xhat, as in the backward of any batch norm, where h is the gradient of xhat ...
    h = per_channel(u - w * s * mean_vx) * dy_ - per_channel(w * s * mean_dyx) * v_
    mean_h = mean_udy - w * s * (mean_v * mean_dyx + mean_vx * mean_dy)
    mean_hx = mean_udyx - 2 * w * s * mean_vx * mean_dyx
    # ... and through the factor s of dx
    slope = s * mean_hx + w * s.square() * (mean_vdy - mean_v * mean_dy - mean_vx * mean_dyx)
    d_x = per_channel(s) * (h - per_channel(mean_h)) - per_channel(slope) * xhat

    d_weight = None
    if weight is not None:
        # Of this rank alone, like the first derivative.
        d_weight = (s * (local_vdy - mean_dy * local_v - mean_dyx * local_vx)).to(weight.dtype)
    return d_dy.to(dy.dtype), d_x.to(x.dtype), d_weight
