"""Batch normalisation over the batch of all ranks.

Read from top to bottom: what a user calls, the forward (local moments, one gather, merge, normalise), the
backward (reduce, one all_reduce, apply), whose own derivative is in ``double_backward``.

Shapes: C = channels, W = ranks of the group, N = values a channel over all ranks.
Source: Ioffe and Szegedy, "Batch Normalization" (2015), algorithm 1 and the derivatives after it.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from syncnorm import collectives, fused, groups, kernels, moments, recomputation
from syncnorm.checks import check_input, check_mask, check_vectors, shape, where
from syncnorm.double_backward import double_backward
from syncnorm.errors import InputError, SyncNormError
from syncnorm.whole_batch import of_all_ranks


def sync_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    process_group: Any = None,
    mask: Tensor | None = None,
    residual: Tensor | None = None,
    relu: bool = False,
    num_batches_tracked: Tensor | None = None,
    layer: str = "sync_batch_norm",
) -> Tensor:
    """``F.batch_norm`` over the batches of all ranks, as if they were one.

    Args:
        input: (batch, C, *spatial), floating, 2-D or more; the batch may differ by rank and may be 0.
        running_mean: (C), updated in place in training; None for none.
        running_var: (C), likewise, unbiased over N.
        weight: (C) or None. Its gradient is local: DDP reduces it like any other.
        bias: (C) or None, likewise.
        training: normalise with the batch's statistics. In evaluation nothing is communicated.
        momentum: weight of this batch in the running statistics; None averages over ``num_batches_tracked``.
        eps: added to the biased variance.
        process_group: a ProcessGroup or 1-D DeviceMesh. None is the default group; without one, or in a group
            of one rank, this is ``F.batch_norm``.
        mask: boolean, broadcastable to (batch, *spatial), True where a position counts. What the others hold is
            ignored, and output and gradient are zero there. Ranks may have different numbers, or none.
        residual: added to the output, as a residual block does with its shortcut; of a shape that broadcasts to it.
        relu: return the positive part of the sum. On a GPU with Triton normalising, adding and rectifying are
            one pass (``syncnorm.fused``); elsewhere the last two work in place.
        num_batches_tracked: int64 scalar, one more in training unless all ranks are empty.
        layer: the name by which ranks tell one call from another, and errors name it.

    Returns:
        Like ``input``: same shape, dtype and memory format.

    Raises:
        InputError: a wrong shape, dtype or option, of which the other ranks are told; fewer than two values a channel
            over all ranks (not looked for with a mask on a GPU, where the host would have to wait); a rank
            outside the group. Running statistics are as they were.
        SyncNormError: the ranks called different layers, or another rank refused its input, failed or died.

    Collective: in training all ranks of the group must call, in the same order of layers: one all_gather of
        2C + 1 numbers, in the backward one all_reduce of 2C, in a double backward one of 5C; over gloo, each of
        these is one exchange of frames (``syncnorm.collectives``). A rank takes part in a backward if its
        input, weight or bias needs a gradient, so let them need the same on all ranks.

    Example:
        >>> x = torch.randn(8, 3, 4, 4)
        >>> y = sync_batch_norm(x, torch.zeros(3), torch.ones(3), training=True)
        >>> y.mean().abs().item() < 1e-6
        True
    """
    group = groups.synced_group(groups.resolve(process_group)) if training else None
    try:
        check_input(input)
        check_vectors(input, running_mean=running_mean, running_var=running_var, weight=weight, bias=bias)
        check_mask(input, mask)
    except SyncNormError as error:
        refuse(error, group, input)
        raise
    return batch_norm_over(
        group,
        layer,
        input,
        running_mean,
        running_var,
        weight,
        bias,
        training,
        momentum,
        eps,
        mask,
        num_batches_tracked,
        residual,
        relu,
    )


def refuse(error: Exception, group: dist.ProcessGroup | None, input: Tensor) -> None:
    """Passes ``error``, about to be raised, on to the other ranks, who would wait for this one."""
    if group is not None and torch.compiler.is_compiling():
        from syncnorm import traced

        traced.while_tracing(traced.refuse, str(error), traced.name_of(group), str(input.device))
    elif group is not None:
        collectives.refuse(str(error), group, input.device)


def batch_norm_over(
    group: dist.ProcessGroup | None,
    layer: str,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    mask: Tensor | None,
    num_batches_tracked: Tensor | None,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """:func:`sync_batch_norm` of checked arguments, over a group of two ranks or more; None is this process alone."""
    if training and not groups.syncing():
        group = running_mean = running_var = None
    wrong = ""
    if running_mean is None:
        num_batches_tracked = None  # counts what the running statistics have seen
    elif training and momentum is None and num_batches_tracked is None:
        wrong = "momentum=None averages over num_batches_tracked, which was not given"
    if training and eps <= 0 and (group is not None or mask is not None):
        wrong = f"eps must be positive in training, got {eps}"
    if wrong:
        error = InputError(wrong)
        refuse(error, group, input)
        raise error
    padding = None
    if mask is not None:
        padding = ~mask.expand(input.size(0), *input.shape[2:]).unsqueeze(1)
        # Nothing of what padding holds goes in, NaN included, and no gradient comes out.
        input = input.masked_fill(padding, 0)
    segments = recomputation.owners() if training else []
    # Recomputed, it may be outside of no_sync_stats, and has to know.
    plain = group is None and padding is None and (groups.syncing() or not segments)
    if plain or not training:
        output = _local_batch_norm(
            input, running_mean, running_var, weight, bias, training, momentum, eps, num_batches_tracked
        )
    elif torch.compiler.is_compiling():
        from syncnorm import traced  # not at the top: it imports the compiler, which takes two seconds

        output, mean, var, count = traced.SyncBatchNorm.apply(  # type: ignore[no-untyped-call]
            input, weight, bias, eps, traced.name_of(group), padding, layer
        )
        if running_mean is not None and running_var is not None:
            running = moments.Running(running_mean, running_var, num_batches_tracked, momentum)
            moments.update_running_(running, mean, var, count)
    else:
        running = None
        if running_mean is not None and running_var is not None:
            running = moments.Running(running_mean, running_var, num_batches_tracked, momentum)
        if relu and padding is None and fused.takes(input, residual):
            return fused.sync_batch_norm_relu(input, weight, bias, residual, eps, group, layer, segments, running)
        which = _Which(eps, group, padding, layer, segments, running)
        output = _SyncBatchNorm.apply(input, weight, bias, which)  # type: ignore[no-untyped-call]
    output = add_and_rectify(output, residual, relu)
    return output if padding is None else output.masked_fill(padding, 0)


def add_and_rectify(output: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    """What ``residual`` and ``relu`` stand for, by torch's own operators; ``output`` may be overwritten."""
    if residual is not None:
        output = output.add_(residual) if fused.alike(residual, output) else output + residual
    return output.relu_() if relu else output


class _Which(NamedTuple):
    """What a forward needs beside tensors that may have a gradient."""

    eps: float
    group: dist.ProcessGroup | None
    padding: Tensor | None
    layer: str
    segments: list[Any]
    running: moments.Running | None


class _SyncBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, which: _Which) -> Tensor:
        eps, group, padding, layer, segments, running = which
        passes = kernels.for_device(input.device)
        x = kernels.dense(input, kernels.memory_format(input))
        y = torch.empty_like(x)
        local = kernels.moments_of(x, eps, y, padding)
        whole, _ = of_all_ranks(*local, eps, group, layer, segments, running)
        if x.numel() > 0:
            y = passes.normalise(x, whole.mean, whole.invstd, weight, bias, y)

        # the input and not x, which may be a copy: a second derivative has to find its way back
        ctx.save_for_backward(input, weight, whole.mean, whole.invstd)
        ctx.count, ctx.group, ctx.layer, ctx.number = whole.count, whole.group, layer, whole.number
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, mean, invstd = ctx.saved_tensors
        which = ctx.count, ctx.group, ctx.layer, ctx.number, ctx.bias_dtype, ctx.needs_input_grad
        if torch.is_grad_enabled():  # create_graph=True: as a function of its own it has a derivative in turn
            gradients = _SyncBatchNormBackward.apply(dy, input, weight, mean, invstd, *which)  # type: ignore[no-untyped-call]
        else:
            gradients = _gradients(dy, input, weight, mean, invstd, *which)
        return *gradients[:3], None


def _gradients(
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
    finish = collectives.reduce_sums([sum_dy, sum_dy_xmu], group, layer, number)
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
        dx, d_weight, d_bias, sum_dy, sum_dy_xmu = _gradients(dy, *args)
        ctx.save_for_backward(dy, input, weight, mean, invstd, sum_dy, sum_dy_xmu)
        ctx.count, ctx.group, ctx.layer, ctx.number = count, group, layer, number
        return dx, d_weight, d_bias

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v: Tensor | None, u: Tensor | None, t: Tensor | None) -> tuple[Tensor | None, ...]:
        dy, x, weight, mean, invstd, sum_dy, sum_dy_xmu = ctx.saved_tensors
        d_dy, d_x, d_weight = double_backward(
            dy, x, weight, mean, invstd, sum_dy, sum_dy_xmu, ctx.count, v, u, t, ctx.group, ctx.layer, ctx.number
        )
        return d_dy, d_x, d_weight, *(None,) * 8


def _local_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    num_batches_tracked: Tensor | None,
) -> Tensor:
    """``F.batch_norm`` with the bookkeeping of ``nn.BatchNorm``'s forward; none of it where that is run again."""
    if training:
        local_count = input.numel() // input.size(1)
        if recomputation.in_backward() and running_mean is not None and running_var is not None:
            running_mean, running_var, num_batches_tracked = running_mean.clone(), running_var.clone(), None
        if local_count == 1:
            raise InputError(f"{where()}expected more than 1 value per channel, got input of {shape(input)}")
        if num_batches_tracked is not None and local_count > 0:
            num_batches_tracked.add_(1)
        if momentum is None and num_batches_tracked is not None:
            momentum = 1.0 / max(int(num_batches_tracked), 1)
    return F.batch_norm(
        input, running_mean, running_var, weight, bias, training, 0.0 if momentum is None else momentum, eps
    )
