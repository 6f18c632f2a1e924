"""Batch norm, shortcut and ReLU as one function: ``relu(batch_norm(x) + residual)`` over the batch of all ranks.

The passes are Triton kernels. A step of the three one after the other reads or writes a tensor 16 times, 13 without a
shortcut; here 11 and 8 remain. The sum is never written, and what the ReLU let through is not stored: it is found
again from x or, with a shortcut, from the output, which the next layer keeps anyway.
"""

from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from syncnorm import comm
from syncnorm.layer import checkpointing, kernels, moments
from syncnorm.layer.statistics import global_moments


def supports(input: Tensor, residual: Tensor | None) -> bool:
    """Whether there are kernels for this input, which compute in fp32, and a shortcut of its shape and dtype."""
    if input.dtype == torch.float64 or kernels.fused_for(input.device) is None:
        return False
    return residual is None or same_layout(input, residual)


def _passes(x: Tensor) -> ModuleType:
    passes = kernels.fused_for(x.device)
    assert passes is not None  # supports() asked
    return passes


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether one may be added to the other in place, by one kernel."""
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device


def sync_batch_norm_relu(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    group: dist.ProcessGroup | None,
    layer: str,
    segments: list[Any],
    running: moments.Running | None,
) -> Tensor:
    """What ``functional.batch_norm_over`` is in training, with ``relu=True``, of an input that :func:`supports` took.

    It has no second derivative.

    Collective: as there.
    """
    # The kernels read parameters as one number after the other.
    weight, bias = (None if v is None else v.contiguous() for v in (weight, bias))
    return _SyncBatchNormRelu.apply(input, weight, bias, residual, eps, group, layer, segments, running)  # type: ignore[no-any-return,no-untyped-call]


class _SyncBatchNormRelu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        eps: float,
        group: dist.ProcessGroup | None,
        layer: str,
        segments: list[Any],
        running: moments.Running | None,
    ) -> Tensor:
        layout = kernels.memory_format(input)
        x = kernels.dense(input, layout)
        residual = None if residual is None else kernels.dense(residual, layout)
        y = torch.empty_like(x)
        local = kernels.moments_of(x, eps, y, None)
        whole, _ = global_moments(*local, eps, group, layer, segments, running, node=ctx)
        if x.numel() > 0:
            _passes(x).normalise(x, whole.mean, whole.invstd, weight, bias, residual, y)
        ctx.save_for_backward(input, weight, bias, whole.mean, whole.invstd, None if residual is None else y)
        ctx.count, ctx.group, ctx.layer, ctx.number = whole.count, whole.group, layer, whole.number
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        checkpointing.backward_begins()
        with comm.aborting_peers(ctx.group, dy.device):
            return _gradients(ctx, dy)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    input, weight, bias, mean, invstd, y = ctx.saved_tensors
    passes = _passes(input)
    layout = kernels.memory_format(input)
    x, dy = kernels.dense(input, layout), kernels.dense(dy, layout)

    d_residual = None
    if x.numel() > 0:
        sum_dy, sum_dy_xmu, d_residual = passes.reduce_grad(dy, x, mean, invstd, weight, bias, y)
    else:
        sum_dy, sum_dy_xmu = torch.zeros_like(mean), torch.zeros_like(mean)
        d_residual = None if y is None else dy
    d_bias = None if bias is None else sum_dy.to(bias.dtype)
    with comm.reduce_sums([sum_dy, sum_dy_xmu], ctx.group, ctx.layer, ctx.number) as finish:
        d_weight = None if weight is None else (sum_dy_xmu * invstd).to(weight.dtype)
        sums = finish()
    dx = None
    if ctx.needs_input_grad[0]:
        dx = torch.empty_like(x)
        if x.numel() > 0:
            dz = dy if y is None else d_residual
            passes.finish_grad(dz, x, mean, invstd, weight, bias, *sums, ctx.count, y is None, dx)
    return dx, d_weight, d_bias, d_residual, *(None,) * 5
