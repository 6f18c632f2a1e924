"""Forward and backward as autograd functions: local moments, one gather, merge, normalize; reduce, one sum, apply.

Shapes: C = channels, N = values per channel over all ranks.
Source: Ioffe and Szegedy, "Batch Normalization" (2015), algorithm 1 and the derivatives after it.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from syncnorm import comm
from syncnorm.errors import SyncNormError
from syncnorm.layer import checkpointing, kernels, native_step
from syncnorm.layer.arguments import ForwardCall, NoGradArgs
from syncnorm.layer.double_backward import double_backward
from syncnorm.layer.global_moments import global_moments
from syncnorm.layer.moments import statistics_dtype

ONLY_ONE_BACKWARD = (
    "torch.utils.checkpoint with use_reentrant=True runs a backward of its own for each micro-batch, but those that "
    "run in step share one. Pass use_reentrant=False"
)


def forward(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, args: NoGradArgs, node: Any
) -> tuple[Tensor, checkpointing.ForwardStatistics]:
    """The output, and the statistics of the global batch; ``node`` is the one that autograd makes for this call."""
    x = kernels.dense(input, kernels.memory_format(input))
    y = torch.empty_like(x)
    local = kernels.moments_of(x, args.eps, y, args.padding)
    whole, _ = global_moments(local, args.eps, args.sync, args.running, node=node)
    if x.numel() > 0:
        y = kernels.passes_for(x, weight, bias).normalize(x, whole.mean, whole.invstd, weight, bias, y)
    return y, whole


def backward(
    dy: Tensor,
    input: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    call: ForwardCall,
    bias_dtype: torch.dtype | None,
    needed: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor, Tensor]:
    """Gradients of input, weight and bias, and the two sums over all ranks.

    Args:
        dy: like ``input``, of any strides.
        input: of the forward.
        weight: (C) or None.
        mean: (C), of the global batch.
        invstd: (C), of the global batch.
        call: the forward.
        bias_dtype: None without a bias.
        needed: which of input, weight and bias need a gradient.
    """
    x = kernels.dense(input, kernels.memory_format(input))
    dy = kernels.dense(dy, kernels.memory_format(x))
    passes = kernels.passes_for(x, dy, weight)

    if x.numel() > 0:
        sum_dy, sum_dy_xmu = passes.reduce_grad(dy, x, mean, invstd)
    else:
        sum_dy, sum_dy_xmu = torch.zeros_like(mean), torch.zeros_like(mean)
    # Of this rank alone: DDP averages the gradients of parameters over ranks.
    d_bias = sum_dy.to(bias_dtype) if needed[2] else None

    # Even if this rank's input needs no gradient, as that of an empty rank may: the other ranks wait for the sum.
    with comm.reduce_sums([sum_dy, sum_dy_xmu], call.group, call.layer_name, call.number) as finish:
        # While the sums travel: what does not need them.
        d_weight = (sum_dy_xmu * invstd).to(weight.dtype) if weight is not None and needed[1] else None
        begun = passes.begin_grad(dy, invstd, weight) if needed[0] and x.numel() > 0 else None
        sum_dy, sum_dy_xmu = finish()
    dx = None
    if begun is not None:
        dx = passes.finish_grad(begun, x, mean, invstd, weight, sum_dy, sum_dy_xmu, call.total_count)
    elif needed[0]:
        dx = torch.empty_like(x)
    return dx, d_weight, d_bias, sum_dy, sum_dy_xmu


class SyncBatchNormFunction(torch.autograd.Function):
    """The layer in training, in eager mode; see ``compiled`` and ``func_transforms`` for the other modes."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, args: NoGradArgs) -> Tensor:
        """The output. Collective: one gather."""
        # The input is saved and not its dense copy: the double backward needs its place in the graph.
        if native_step.applies(input, weight, bias, args):
            y, statistics, ctx.call = native_step.forward(input, weight, bias, args)
            ctx.save_for_backward(input, weight, statistics)
        else:
            y, whole = forward(input, weight, bias, args, ctx)
            ctx.call = whole.call
            ctx.save_for_backward(input, weight, whole.mean, whole.invstd)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of input, weight and bias. Collective: one sum."""
        checkpointing.backward_begins()
        if ctx.call.window is not None:
            ctx.call.window.model.backwards += 1
        dy = plain_tensor(dy)
        try:
            if ctx.call.in_step:
                raise SyncNormError(ONLY_ONE_BACKWARD)
            input, weight, *statistics = ctx.saved_tensors
            call, bias_dtype, needed = ctx.call, ctx.bias_dtype, ctx.needs_input_grad
            differentiated = torch.is_grad_enabled()  # create_graph=True: the backward needs a derivative in turn
            if len(statistics) == 1:
                if not differentiated and native_step.can_differentiate(dy, input, weight, statistics[0]):
                    return *native_step.backward(dy, input, weight, statistics[0], call, bias_dtype, needed), None
                statistics = statistics[0].unbind(0)
            compute = differentiable_backward if differentiated else backward
            # Hooks of saved tensors may have changed the dtype.
            mean, invstd = (v.to(statistics_dtype(input.dtype)) for v in statistics)
            return *compute(dy, input, weight, mean, invstd, call, bias_dtype, needed)[:3], None
        except BaseException as error:
            comm.abort_peers_with(error, ctx.call.group, dy.device)
            raise


def differentiable_backward(dy: Tensor, *args: Any) -> tuple[Tensor | None, ...]:
    """Gradients of input, weight and bias: :func:`backward` with a derivative in turn."""
    return _Backward.apply(dy, *args)  # type: ignore[no-any-return,no-untyped-call]  # torch leaves it untyped


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dy: Tensor, *args: Any) -> tuple[Tensor | None, ...]:
        input, weight, mean, invstd, call, _, _ = args
        dx, d_weight, d_bias, sum_dy, sum_dy_xmu = backward(dy, *args)
        ctx.save_for_backward(dy, input, weight, mean, invstd, sum_dy, sum_dy_xmu)
        ctx.call, ctx.device = call, mean.device
        return dx, d_weight, d_bias

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v: Tensor | None, u: Tensor | None, t: Tensor | None) -> tuple[Tensor | None, ...]:
        with comm.aborting_peers(ctx.call.group, ctx.device):
            dy, x, weight, mean, invstd, sum_dy, sum_dy_xmu = ctx.saved_tensors
            d_dy, d_x, d_weight = double_backward(dy, x, weight, mean, invstd, sum_dy, sum_dy_xmu, ctx.call, v, u, t)
        return d_dy, d_x, d_weight, *(None,) * 5


def has_own_class(x: Tensor) -> bool:
    """Whether ``x`` is of a Tensor subclass with a ``__torch_function__`` over an ordinary tensor's data."""
    own = type(x)
    listens = own.__torch_function__ is not torch._C._disabled_torch_function_impl
    return own is not Tensor and listens and own.__torch_dispatch__ is Tensor.__torch_dispatch__


def plain_tensor(x: Tensor) -> Tensor:
    """``x`` as an ordinary tensor: an autograd function that returned the subclass would return a view of it."""
    return x.as_subclass(Tensor) if has_own_class(x) else x
