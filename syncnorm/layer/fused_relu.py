"""Batch norm, shortcut and ReLU as one function: ``relu(batch_norm(x) + residual)`` over the global batch.

The passes are Triton kernels. A step of the three functions in turn reads or writes a tensor 16 times, 13 without a
shortcut; the fused step does so 11 and 8 times. The sum is never written, and the mask of the ReLU is not stored: it
is recomputed from x or, with a shortcut, from the output, which the next layer keeps anyway.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from syncnorm import comm
from syncnorm.layer import checkpointing, kernels
from syncnorm.layer.arguments import NoGradArgs
from syncnorm.layer.global_moments import global_moments


def supports(input: Tensor, residual: Tensor | None) -> bool:
    """Whether there are kernels for this input, which compute in fp32, and for a shortcut of its shape and dtype."""
    if input.dtype == torch.float64 or kernels.fused_for(input.device) is None:
        return False
    return residual is None or same_layout(input, residual)


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether one kernel can add ``b`` to ``a`` in place."""
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device


def batch_norm_relu(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, args: NoGradArgs
) -> Tensor:
    """``relu(batch_norm(input) + residual)`` in training, of an input that :func:`supports` accepts, without padding.

    It has no second derivative.

    Collective: all ranks of the group, one gather; in the backward one sum.
    """
    # The kernels read parameters at consecutive addresses.
    weight, bias = (None if v is None else v.contiguous() for v in (weight, bias))
    return _SyncBatchNormRelu.apply(input, weight, bias, residual, args)  # type: ignore[no-any-return,no-untyped-call]  # torch leaves it untyped


class _SyncBatchNormRelu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        args: NoGradArgs,
    ) -> Tensor:
        layout = kernels.memory_format(input)
        x = kernels.dense(input, layout)
        residual = None if residual is None else kernels.dense(residual, layout)
        y = torch.empty_like(x)
        local = kernels.moments_of(x, args.eps, y, None)
        whole, _ = global_moments(local, args.eps, args.sync, args.running, node=ctx)
        if x.numel() > 0:
            _passes(x).normalize(x, whole.mean, whole.invstd, weight, bias, residual, y)
        ctx.save_for_backward(input, weight, bias, whole.mean, whole.invstd, None if residual is None else y)
        ctx.call = whole.call
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        checkpointing.backward_begins()
        with comm.aborting_peers(ctx.call.group, dy.device):
            return _gradients(ctx, dy)


def _passes(x: Tensor) -> ModuleType:
    passes = kernels.fused_for(x.device)
    assert passes is not None  # supports() has checked
    return passes


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    input, weight, bias, mean, invstd, y = ctx.saved_tensors
    call = ctx.call
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
    with comm.reduce_sums([sum_dy, sum_dy_xmu], call.group, call.layer_name, call.number) as finish:
        d_weight = None if weight is None else (sum_dy_xmu * invstd).to(weight.dtype)
        sums = finish()
    dx = None
    if ctx.needs_input_grad[0]:
        dx = torch.empty_like(x)
        if x.numel() > 0:
            dz = dy if y is None else d_residual
            passes.finish_grad(dz, x, mean, invstd, weight, bias, *sums, call.total_count, y is None, dx)
    return dx, d_weight, d_bias, d_residual, None
