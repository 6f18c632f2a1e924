"""The usual step on a GPU: three kernels and a gather in the forward, two kernels and a sum in the backward.

It computes what ``autograd.forward`` and ``autograd.backward`` compute, which are easier to read, and what comes
before and after them: the mask, the shortcut and the ReLU of ``relu(batch_norm(x) + shortcut)``. A step of the three
functions in turn reads or writes a tensor 16 times, 13 without a shortcut; this one does so 11 and 8 times. The sum
is never written, and where the ReLU is open is computed again from x or, with a shortcut, from the output, which the
next layer keeps anyway.

The generic functions remain for fp64, for groups that exchange frames, for devices without Triton and for second
derivatives. Ranks that run one and ranks that run the other exchange the same rows.
"""

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from syncnorm import comm
from syncnorm.layer import autograd, checkpointing, kernels
from syncnorm.layer.arguments import ForwardCall, NoGradArgs
from syncnorm.layer.checks import check_count
from syncnorm.layer.kernels import cuda, launch
from syncnorm.layer.kernels.cpu import per_channel
from syncnorm.layer.moments import statistics_dtype

_DTYPES = torch.float32, torch.bfloat16, torch.float16
_PLAIN = Tensor, torch.nn.Parameter


def applies(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    args: NoGradArgs,
) -> bool:
    """Whether the kernels can read and write these tensors, and the group's own collectives carry the statistics."""
    if (
        torch.compiler.is_compiling()
        or args.sync.group is None
        or args.sync.window is not None
        or not launch.passes_available(input.device)
    ):
        return False
    return (
        torch._C._functorch.peek_interpreter_stack() is None
        and _readable(input, weight, bias, residual)
        and (residual is None or same_layout(input, residual))
        and (mask is None or (type(mask) is Tensor and mask.device == input.device))
        and (args.running is None or cuda.can_track(args.running))
        and comm.exchange_of(args.sync.group, input.device) is None
        and works_on(input.device)
    )


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether one kernel can add ``b`` to ``a`` in place."""
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device


def _readable(*tensors: Tensor | None) -> bool:
    """Whether these are ordinary tensors, neither of a subclass nor lazily negated, of dtypes that kernels read."""
    for t in tensors:
        if t is not None and (type(t) not in _PLAIN or t.dtype not in _DTYPES or t.is_neg() or t._is_zerotensor()):
            return False
    return True


@functools.cache
def works_on(device: torch.device) -> bool:
    """Whether Triton can compile and launch a kernel: learned before the first collective, which has to follow."""
    try:
        _forward_kernels().pack_moments(torch.zeros((1, 1), dtype=torch.float32, device=device), 1.0, 0.0, None)
    except launch.TritonFailed:
        return False
    return True


@functools.cache
def _forward_kernels() -> ModuleType:
    from syncnorm.layer.kernels import triton_forward  # not at the top: it imports a compiler

    return triton_forward


@functools.cache
def _sum_kernels() -> ModuleType:
    from syncnorm.layer.kernels import triton_sums  # as above

    return triton_sums


@functools.cache
def _backward_kernels() -> ModuleType:
    from syncnorm.layer.kernels import triton_backward  # as above

    return triton_backward


def batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    relu: bool,
    args: NoGradArgs,
) -> Tensor:
    """``relu(batch_norm(input) + residual)`` in training, of arguments for which :func:`applies` is true.

    Args:
        input: (batch, C, *spatial).
        weight: (C) or None.
        bias: (C) or None.
        residual: like input, or None.
        mask: boolean, broadcastable to (batch, *spatial), True where a position counts; the output and all gradients
            are zero elsewhere, and what is there in the input is not read, even NaN.
        relu: without it there is no ReLU, and the function has a second derivative.
        args: the other arguments; ``padding`` is not read.

    Collective: all ranks of the group, one gather, or from many ranks on one sum; in the backward one sum.
    """
    return _Step.apply(input, weight, bias, residual, mask, relu, args)  # type: ignore[no-any-return,no-untyped-call]  # torch leaves it untyped


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        mask: Tensor | None,
        relu: bool,
        args: NoGradArgs,
    ) -> Tensor:
        layout = kernels.memory_format(input)
        x = kernels.dense(input, layout)
        if mask is not None:
            mask = mask.expand(x.size(0), *x.shape[2:]).contiguous()
        whole = _global_moments(x, mask, args, ctx)
        y = torch.empty_like(x)
        if x.numel() > 0:
            shortcut = None if residual is None else kernels.dense(residual, layout)
            _forward_kernels().normalize(
                x, whole.mean, whole.invstd, _dense(weight), _dense(bias), shortcut, mask, relu, y
            )
        # Where the ReLU is open is known from the output if there is a shortcut, otherwise from x and the bias.
        kept_y, kept_bias = (y, None) if residual is not None else (None, bias)
        if not relu:
            kept_y = kept_bias = None
        ctx.save_for_backward(input, weight, kept_y, kept_bias, whole.mean, whole.invstd, mask)
        ctx.call, ctx.relu = whole.call, relu
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        checkpointing.backward_begins()
        with comm.aborting_peers(ctx.call.group, dy.device):
            dy = autograd.plain_tensor(dy)
            if torch.is_grad_enabled() and not ctx.relu:  # create_graph=True
                return _by_generic_passes(ctx, dy, ctx.saved_tensors, autograd.differentiable_backward)
            return _gradients(ctx, dy)


def _dense(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()


def _global_moments(x: Tensor, mask: Tensor | None, args: NoGradArgs, node: Any) -> checkpointing.ForwardStatistics:
    """``global_moments`` in two kernels; in a recomputation none, unless the segment runs the layer several times."""
    (group, layer_name, owners, _), channels = args.sync, x.size(1)
    eps = float(args.eps)  # Triton takes no numbers of NumPy
    assert group is not None, "applies() has checked it"
    moves, counts = checkpointing.updates_of(args.running)
    count = checkpointing.UNKNOWN if mask is not None and x.numel() > 0 else x.numel() // channels
    if checkpointing.in_backward():
        first = checkpointing.only_candidate(layer_name, channels, count)
        if first is None and checkpointing.known(layer_name):
            first = checkpointing.lookup(layer_name, _local_moments(x, mask, eps), count, moves)
        if first is not None:
            first.complete(args.running, moves, counts)
            return first
    call = comm.native_call(comm.Kind.FORWARD, layer_name, channels, torch.float32, eps, group, x.device)
    assert call is not None, "applies() has checked it"
    packed = _forward_kernels().pack_moments(x, eps, call.tag, mask, to_sum=call.sums)
    mean, invstd, var, total = _merged(call, packed, count, args)
    record = checkpointing.ForwardStatistics(
        mean, invstd, var, total, ForwardCall(total, group, layer_name, call.number)
    )
    record.note(moves, counts)
    if owners:
        # A sum has overwritten the row of this rank.
        local = _local_moments(x, mask, eps) if call.sums else packed[: 2 * channels].view(2, channels)
        checkpointing.remember(record, local, count, owners, node)
    return record


def _local_moments(x: Tensor, mask: Tensor | None, eps: float) -> Tensor:
    """Mean and invstd of this rank's batch, (2, C), by which a recomputation is recognized."""
    channels = x.size(1)
    packed: Tensor = _forward_kernels().pack_moments(x, eps, 0.0, mask)
    return packed[: 2 * channels].view(2, channels)


def _merged(
    call: comm.NativeCall, packed: Tensor, local_count: int, args: NoGradArgs
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(mean, invstd, var, count)`` of the global batch, from the row of this rank. One gather, or one sum."""
    if call.sums:
        rows, tag, merge = call.sum_(packed), call.tag_sum, _sum_kernels().merge_sums
    else:
        rows, tag, merge = call.gather(packed), call.tag, _forward_kernels().merge
    if local_count in (0, 1):  # with more the whole batch has more than one
        check_count(rows[:1] if call.sums else rows[:, -2:-1], local_count)
    return merge(rows, float(args.eps), tag, call.mismatch, call.reported, args.running)  # type: ignore[no-any-return]  # of a module


@once_differentiable
def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # once: a checkpoint computes them again
    input, weight, y, bias, mean, invstd, mask = saved
    group, layer_name, number = ctx.call.group, ctx.call.layer_name, ctx.call.number
    call = None
    # Hooks of saved tensors may return anything. A recomputed forward has the record of its first run, which may have
    # been one of this process alone, or in a Join. If only the shortcut needs a gradient, there is no collective.
    usual = group is not None and isinstance(ctx.call.total_count, Tensor) and any(ctx.needs_input_grad[:3])
    if usual and _readable(dy, input, weight, y, bias, mean, invstd):
        call = comm.native_call(
            comm.Kind.BACKWARD, layer_name, input.size(1), torch.float32, 0.0, group, dy.device, number
        )
    if call is None:
        return _by_generic_passes(ctx, dy, saved, autograd.backward)

    layout = kernels.memory_format(input)
    x, dy = kernels.dense(input, layout), kernels.dense(dy, layout)
    y = None if y is None else kernels.dense(y, layout)
    mean, invstd, weight, bias = mean.float(), invstd.float(), _dense(weight), _dense(bias)
    d_weight = torch.empty_like(weight) if weight is not None and ctx.needs_input_grad[1] else None
    d_bias = mean.new_empty(mean.shape, dtype=ctx.bias_dtype) if ctx.needs_input_grad[2] else None
    packed, dz = _backward_kernels().pack_sums(
        dy, x, mean, invstd, weight, bias, y, mask, ctx.relu, call.tag, d_weight, d_bias
    )
    call.sum_(packed)
    dx = torch.empty_like(x, dtype=dy.dtype) if ctx.needs_input_grad[0] else None
    if dx is not None:
        _backward_kernels().finish(
            dy if dz is None else dz, x, mean, invstd, weight, bias, mask, packed, ctx.call.total_count,
            ctx.relu and dz is None, call.tag_sum, call.mismatch, call.reported, dx,
        )  # fmt: skip
    d_residual = None
    if ctx.needs_input_grad[3]:
        d_residual = dz if dz is not None else _where_counted(mask, dy)
    return dx, d_weight, d_bias, d_residual, None, None, None


def _by_generic_passes(
    ctx: Any, dy: Tensor, saved: tuple[Any, ...], backward: Callable[..., tuple[Tensor | None, ...]]
) -> tuple[Tensor | None, ...]:
    """The same by ``backward``, which is ``autograd.backward`` or its differentiable form."""
    input, weight, y, bias, mean, invstd, mask = saved
    mean, invstd = (v.to(statistics_dtype(dy.dtype)) for v in (mean, invstd))
    x, dy = _where_counted(mask, input.to(dy.dtype)), _where_counted(mask, dy)
    if ctx.relu:
        if y is None:
            scale = invstd if weight is None else invstd * weight
            y = (x - per_channel(mean, x)) * per_channel(scale, x)
            y = y if bias is None else y + per_channel(bias, x)
        dy = torch.where(y <= 0, 0, dy)
    needed = ctx.needs_input_grad[:3]
    dx, d_weight, d_bias = None, None, None
    if any(needed):
        dx, d_weight, d_bias, *_ = backward(dy, x, weight, mean, invstd, ctx.call, ctx.bias_dtype, needed)
        dx = None if dx is None else _where_counted(mask, dx)
    return dx, d_weight, d_bias, dy if ctx.needs_input_grad[3] else None, None, None, None


def _where_counted(mask: Tensor | None, values: Tensor) -> Tensor:
    """``values`` at the positions that count, zero elsewhere."""
    return values if mask is None else torch.where(mask.unsqueeze(1), values, 0)
