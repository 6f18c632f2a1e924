"""Forward and backward as autograd functions: local moments, one gather, merge, normalize; reduce, one sum, apply.

Shapes: C = channels, N = values a channel over all ranks.
Source: Ioffe and Szegedy, "Batch Normalization" (2015), algorithm 1 and the derivatives after it.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from syncnorm import comm
from syncnorm.layer import checkpointing, kernels, moments
from syncnorm.layer.double_backward import double_backward
from syncnorm.layer.statistics import global_moments


class Which(NamedTuple):
    """What a forward needs besides the tensors that may have a gradient."""

    eps: float
    group: dist.ProcessGroup | None
    padding: Tensor | None
    layer: str
    segments: list[Any]
    running: moments.Running | None


def normalized(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, which: Which, node: Any
) -> tuple[Tensor, checkpointing.ForwardStatistics]:
    """The forward: the output, and the statistics of all ranks. ``node`` is the graph's."""
    eps, group, padding, layer, segments, running = which
    x = kernels.dense(input, kernels.memory_format(input))
    y = torch.empty_like(x)
    local = kernels.moments_of(x, eps, y, padding)
    whole, _ = global_moments(*local, eps, group, layer, segments, running, node=node)
    if x.numel() > 0:
        y = kernels.for_device(input.device).normalise(x, whole.mean, whole.invstd, weight, bias, y)
    return y, whole


class SyncBatchNormFunction(torch.autograd.Function):
    """The layer in training, in eager mode. ``traced`` has it for the compiler, ``transforms`` for ``torch.func``."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, which: Which) -> Tensor:
        """The output. Collective: one gather."""
        y, whole = normalized(input, weight, bias, which, ctx)
        # the input and not x, which may be a copy: a second derivative has to find its way back
        ctx.save_for_backward(input, weight, whole.mean, whole.invstd)
        ctx.count, ctx.group, ctx.layer, ctx.number = whole.count, whole.group, which.layer, whole.number
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of input, weight and bias. Collective: one sum."""
        checkpointing.backward_begins()
        dy = plain_tensor(dy)
        with comm.aborting_peers(ctx.group, dy.device):
            input, weight, mean, invstd = ctx.saved_tensors
            which = ctx.count, ctx.group, ctx.layer, ctx.number, ctx.bias_dtype, ctx.needs_input_grad
            if torch.is_grad_enabled():  # create_graph=True: as a function of its own it has a derivative in turn
                gradients = _SyncBatchNormBackward.apply(dy, input, weight, mean, invstd, *which)  # type: ignore[no-untyped-call]
            else:
                gradients = gradients_of(dy, input, weight, mean, invstd, *which)
            return *gradients[:3], None


def gradients_of(
    dy: Tensor,
    input: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    count: moments.Count,
    group: dist.ProcessGroup | None,
    layer: str,
    number: int,
    bias_dtype: torch.dtype | None,
    needed: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor, Tensor]:
    """Gradients of input, weight and bias, and the two sums over all ranks: the backward."""
    passes = kernels.for_device(input.device)
    x = kernels.dense(input, kernels.memory_format(input))
    dy = kernels.dense(dy, kernels.memory_format(x))

    if x.numel() > 0:
        sum_dy, sum_dy_xmu = passes.reduce_grad(dy, x, mean, invstd)
    else:
        sum_dy, sum_dy_xmu = torch.zeros_like(mean), torch.zeros_like(mean)
    # Local on purpose: DDP averages the gradients of parameters over ranks.
    d_bias = sum_dy.to(bias_dtype) if needed[2] else None

    # Also where this rank's own input needs no gradient, as that of an empty rank may: the others wait.
    with comm.reduce_sums([sum_dy, sum_dy_xmu], group, layer, number) as finish:
        # While the sums travel: what does not need them.
        d_weight = (sum_dy_xmu * invstd).to(weight.dtype) if weight is not None and needed[1] else None
        begun = passes.begin_grad(dy, invstd, weight) if needed[0] and x.numel() > 0 else None
        sum_dy, sum_dy_xmu = finish()
    dx = None
    if begun is not None:
        dx = passes.finish_grad(begun, x, mean, invstd, weight, sum_dy, sum_dy_xmu, count)
    elif needed[0]:
        dx = torch.empty_like(x)
    return dx, d_weight, d_bias, sum_dy, sum_dy_xmu


class _SyncBatchNormBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dy: Tensor, *args: Any) -> tuple[Tensor | None, ...]:
        input, weight, mean, invstd, count, group, layer, number, _, _ = args
        dx, d_weight, d_bias, sum_dy, sum_dy_xmu = gradients_of(dy, *args)
        ctx.save_for_backward(dy, input, weight, mean, invstd, sum_dy, sum_dy_xmu)
        ctx.count, ctx.group, ctx.layer, ctx.number, ctx.device = count, group, layer, number, mean.device
        return dx, d_weight, d_bias

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v: Tensor | None, u: Tensor | None, t: Tensor | None) -> tuple[Tensor | None, ...]:
        with comm.aborting_peers(ctx.group, ctx.device):
            dy, x, weight, mean, invstd, sum_dy, sum_dy_xmu = ctx.saved_tensors
            d_dy, d_x, d_weight = double_backward(
                dy, x, weight, mean, invstd, sum_dy, sum_dy_xmu, ctx.count, v, u, t, ctx.group, ctx.layer, ctx.number
            )
        return d_dy, d_x, d_weight, *(None,) * 8


def has_own_class(x: Tensor) -> bool:
    """Whether a user's subclass of Tensor has a say in torch's functions, over data that are an ordinary tensor's."""
    own = type(x)
    listens = own.__torch_function__ is not torch._C._disabled_torch_function_impl
    return own is not Tensor and listens and own.__torch_dispatch__ is Tensor.__torch_dispatch__


def plain_tensor(x: Tensor) -> Tensor:
    """``x`` as an ordinary tensor: else what a function returns is a view, by the subclass, of what it has made."""
    return x.as_subclass(Tensor) if has_own_class(x) else x
