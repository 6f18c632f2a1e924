"""The layer under the transforms of ``torch.func``: ``grad``, ``vjp``, ``jacrev``, and ``vmap``.

They ask an autograd function for another form, which binds its arguments anew at each call: that is why it stands
here, and not in ``autograd``, whose maths it calls. ``vmap`` over B batches is one batch norm of B * C channels.
"""

from typing import Any, NoReturn

import torch
from torch import Tensor

from syncnorm import comm
from syncnorm.errors import InputError
from syncnorm.layer.autograd import Which, gradients_of, normalized
from syncnorm.layer.double_backward import double_backward
from syncnorm.layer.moments import Count, Running


def sync_batch_norm(input: Tensor, weight: Tensor | None, bias: Tensor | None, which: Which) -> Tensor:
    """The output, as of ``autograd.SyncBatchNormFunction``.

    Raises:
        InputError: under ``torch.func.jvp`` or ``jacfwd``; under ``vmap``, what cannot be done for all batches.
    """
    stack = torch._C._functorch.get_interpreter_stack() or []
    if any(interpreter.key() == torch._C._functorch.TransformType.Jvp for interpreter in stack):
        raise InputError(f"{which.layer} has no forward-mode derivative in training: use grad, vjp or jacrev")
    return _Forward.apply(input, weight, bias, which)[0]  # type: ignore[no-any-return,no-untyped-call]


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(
        input: Tensor, weight: Tensor | None, bias: Tensor | None, which: Which
    ) -> tuple[Tensor, Tensor, Tensor, Count, int]:
        y, whole = normalized(input, weight, bias, which, None)
        return y, whole.mean, whole.invstd, whole.count, whole.number

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        input, weight, bias, which = inputs
        _, mean, invstd, count, number = output
        ctx.save_for_backward(input, weight, mean, invstd)
        ctx.mark_non_differentiable(mean, invstd)
        ctx.rest = count, which.group, which.layer, number, None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        gradients = _Backward.apply(dy, *ctx.saved_tensors, *ctx.rest, ctx.needs_input_grad)  # type: ignore[no-untyped-call]
        return *gradients[:3], None

    @staticmethod
    def vmap(info: Any, in_dims: Any, input: Tensor, weight: Any, bias: Any, which: Which) -> tuple[Any, Any]:
        batches = info.batch_size
        if which.padding is not None and in_dims[3].padding is not None:
            raise InputError(f"vmap over {which.layer} takes one mask for all batches, not one for each")
        which = which._replace(running=_folded_running(which, in_dims[3].running, batches))
        vectors = (_folded_vector(v, dim, batches) for v, dim in zip((weight, bias), in_dims[1:3], strict=True))
        y, mean, invstd, count, number = _Forward.apply(_folded(input, in_dims[0], batches), *vectors, which)  # type: ignore[no-untyped-call]
        output = _unfolded(y, batches), mean.view(batches, -1), invstd.view(batches, -1), count, number
        return output, (1, 0, 0, None, None)


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(dy: Tensor, input: Tensor, *rest: Any) -> tuple[Tensor | None, ...]:
        with comm.aborting_peers(rest[4], input.device):
            return gradients_of(dy, input, *rest)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        dy, input, weight, mean, invstd, count, group, layer, number, *_ = inputs
        ctx.save_for_backward(dy, input, weight, mean, invstd, *output[3:])
        ctx.mark_non_differentiable(*output[3:])
        ctx.rest = count, group, layer, number

    @staticmethod
    def backward(ctx: Any, v: Tensor, u: Tensor | None, t: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        count, *rest = ctx.rest
        return *_DoubleBackward.apply(*ctx.saved_tensors, count, v, u, t, *rest), *(None,) * 8  # type: ignore[no-untyped-call]

    @staticmethod
    def vmap(info: Any, in_dims: Any, dy: Tensor, input: Tensor, *rest: Any) -> tuple[Any, Any]:
        batches, (*vectors, count, group, layer, number, bias_dtype, needed) = info.batch_size, rest
        tensors = (_folded(x, dim, batches) for x, dim in zip((dy, input), in_dims, strict=False))
        vectors = [_folded_vector(v, dim, batches) for v, dim in zip(vectors, in_dims[2:], strict=False)]
        dx, *of_channels = _Backward.apply(*tensors, *vectors, count, group, layer, number, bias_dtype, needed)  # type: ignore[no-untyped-call]
        of_channels = [None if v is None else v.view(batches, -1) for v in of_channels]
        dims = tuple(None if v is None else 0 for v in of_channels)
        return (None if dx is None else _unfolded(dx, batches), *of_channels), (None if dx is None else 1, *dims)


class _DoubleBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, invstd: Tensor, sum_dy: Tensor,
        sum_dy_xmu: Tensor, count: Count, v: Tensor | None, u: Tensor | None, t: Tensor | None, group: Any,
        layer: str, number: int,
    ) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
        with comm.aborting_peers(group, x.device):
            return double_backward(
                dy, x, weight, mean, invstd, sum_dy, sum_dy_xmu, count, v, u, t, group, layer, number
            )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.layer = inputs[-2]

    @staticmethod
    def backward(ctx: Any, *_: Any) -> NoReturn:
        raise InputError(f"{ctx.layer} has no third derivative")

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> NoReturn:
        raise InputError(f"{args[-2]} has no second derivative under vmap")


def _folded(x: Tensor, dim: int | None, batches: int) -> Tensor:
    """B batches (N, C, ...), or one for all of them, as one of (N, B * C, ...)."""
    x = x.unsqueeze(1).expand(-1, batches, *x.shape[1:]) if dim is None else x.movedim(dim, 1)
    return x.flatten(1, 2)


def _unfolded(x: Tensor, batches: int) -> Tensor:
    """(N, B * C, ...) as (N, B, C, ...)."""
    return x.view(x.size(0), batches, x.size(1) // batches, *x.shape[2:])


def _folded_vector(vector: Tensor | None, dim: int | None, batches: int) -> Tensor | None:
    """(C), or B of them, as (B * C)."""
    if vector is None:
        return None
    return vector.repeat(batches) if dim is None else vector.movedim(dim, 0).flatten()


def _folded_running(which: Which, in_dims: Running | None, batches: int) -> Running | None:
    """Running statistics of B layers as those of one, in the same memory."""
    running = which.running
    if running is None or in_dims is None:
        return None
    if in_dims.mean != 0 or in_dims.var != 0 or not (running.mean.is_contiguous() and running.var.is_contiguous()):
        raise InputError(
            f"vmap over {which.layer} would move the same running statistics once for each of {batches} batches: "
            f"give each its own, stacked as by torch.func.stack_module_state, or build the layer with "
            f"track_running_stats=False"
        )
    if running.momentum is None:
        raise InputError(f"vmap over {which.layer} takes no momentum=None")
    return running._replace(mean=running.mean.view(-1), var=running.var.view(-1))
