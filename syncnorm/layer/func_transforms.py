"""The layer under the transforms of ``torch.func``: ``grad``, ``vjp``, ``jacrev``, and ``vmap``.

They require autograd functions with ``setup_context``, which are slower in plain eager mode: therefore these classes,
around the functions of ``autograd``. ``vmap`` over B batches is one batch norm of B * C channels.
"""

from typing import Any, NoReturn

import torch
from torch import Tensor

from syncnorm import comm
from syncnorm.errors import InputError
from syncnorm.layer import autograd
from syncnorm.layer.arguments import ForwardCall, NoGradArgs
from syncnorm.layer.double_backward import double_backward
from syncnorm.layer.moments import Count, Running


def batch_norm(input: Tensor, weight: Tensor | None, bias: Tensor | None, args: NoGradArgs) -> Tensor:
    """The output, as that of ``autograd.SyncBatchNormFunction``.

    Raises:
        InputError: under ``torch.func.jvp`` or ``jacfwd``; under ``vmap`` with arguments that the batches cannot
            share; with a window of micro-batches.
    """
    stack = torch._C._functorch.get_interpreter_stack() or []
    if any(interpreter.key() == torch._C._functorch.TransformType.Jvp for interpreter in stack):
        raise InputError(
            f"{args.sync.layer_name} has no forward-mode derivative in training: use grad, vjp or jacrev"
        )
    if args.sync.window is not None:
        raise InputError(
            f"{args.sync.layer_name} accumulates statistics over micro-batches, which torch.func's transforms do not "
            f"support: syncnorm.convert(model, accumulate=1) turns that off"
        )
    return _Forward.apply(input, weight, bias, args)[0]  # type: ignore[no-any-return,no-untyped-call]  # torch leaves it untyped


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(
        input: Tensor, weight: Tensor | None, bias: Tensor | None, args: NoGradArgs
    ) -> tuple[Tensor, Tensor, Tensor, Count, int]:
        y, whole = autograd.forward(input, weight, bias, args, None)
        return y, whole.mean, whole.invstd, whole.call.total_count, whole.call.number

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        input, weight, bias, args = inputs
        _, mean, invstd, count, number = output
        ctx.save_for_backward(input, weight, mean, invstd)
        ctx.mark_non_differentiable(mean, invstd)
        ctx.call = ForwardCall(count, args.sync.group, args.sync.layer_name, number)
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        gradients = _Backward.apply(  # type: ignore[no-untyped-call]  # torch leaves it untyped
            dy, *ctx.saved_tensors, ctx.call, ctx.bias_dtype, ctx.needs_input_grad
        )
        return *gradients[:3], None

    @staticmethod
    def vmap(info: Any, in_dims: Any, input: Tensor, weight: Any, bias: Any, args: NoGradArgs) -> tuple[Any, Any]:
        batches = info.batch_size
        if args.padding is not None and in_dims[3].padding is not None:
            raise InputError(
                f"vmap over {args.sync.layer_name} supports one mask for all batches, got one for each batch"
            )
        args = args._replace(running=_folded_running(args, in_dims[3].running, batches))
        vectors = (_folded_vector(v, dim, batches) for v, dim in zip((weight, bias), in_dims[1:3], strict=True))
        y, mean, invstd, count, number = _Forward.apply(_folded(input, in_dims[0], batches), *vectors, args)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        output = _unfolded(y, batches), mean.view(batches, -1), invstd.view(batches, -1), count, number
        return output, (1, 0, 0, None, None)


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(dy: Tensor, input: Tensor, *rest: Any) -> tuple[Tensor | None, ...]:
        weight, mean, invstd, call, bias_dtype, needed = rest
        with comm.aborting_peers(call.group, input.device):
            return autograd.backward(dy, input, weight, mean, invstd, call, bias_dtype, needed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        dy, input, weight, mean, invstd, call, *_ = inputs
        ctx.save_for_backward(dy, input, weight, mean, invstd, *output[3:])
        ctx.mark_non_differentiable(*output[3:])
        ctx.call = call

    @staticmethod
    def backward(ctx: Any, v: Tensor, u: Tensor | None, t: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        gradients = _DoubleBackward.apply(*ctx.saved_tensors, ctx.call, v, u, t)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return *gradients, *(None,) * 5

    @staticmethod
    def vmap(info: Any, in_dims: Any, dy: Tensor, input: Tensor, *rest: Any) -> tuple[Any, Any]:
        batches, (*vectors, call, bias_dtype, needed) = info.batch_size, rest
        tensors = (_folded(x, dim, batches) for x, dim in zip((dy, input), in_dims, strict=False))
        vectors = [_folded_vector(v, dim, batches) for v, dim in zip(vectors, in_dims[2:], strict=False)]
        dx, *of_channels = _Backward.apply(*tensors, *vectors, call, bias_dtype, needed)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        of_channels = [None if v is None else v.view(batches, -1) for v in of_channels]
        dims = tuple(None if v is None else 0 for v in of_channels)
        return (None if dx is None else _unfolded(dx, batches), *of_channels), (None if dx is None else 1, *dims)


class _DoubleBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, invstd: Tensor, sum_dy: Tensor,
        sum_dy_xmu: Tensor, call: ForwardCall, v: Tensor | None, u: Tensor | None, t: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
        with comm.aborting_peers(call.group, x.device):
            return double_backward(dy, x, weight, mean, invstd, sum_dy, sum_dy_xmu, call, v, u, t)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.layer_name = inputs[-4].layer_name

    @staticmethod
    def backward(ctx: Any, *_: Any) -> NoReturn:
        raise InputError(f"{ctx.layer_name} has no third derivative")

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> NoReturn:
        raise InputError(f"{args[-4].layer_name} has no second derivative under vmap")


def _folded(x: Tensor, dim: int | None, batches: int) -> Tensor:
    """B batches of (N, C, ...), or one that they share, as one batch of (N, B * C, ...)."""
    x = x.unsqueeze(1).expand(-1, batches, *x.shape[1:]) if dim is None else x.movedim(dim, 1)
    return x.flatten(1, 2)


def _unfolded(x: Tensor, batches: int) -> Tensor:
    """(N, B * C, ...) as (N, B, C, ...)."""
    return x.view(x.size(0), batches, x.size(1) // batches, *x.shape[2:])


def _folded_vector(vector: Tensor | None, dim: int | None, batches: int) -> Tensor | None:
    """One vector (C), or B of them, as (B * C)."""
    if vector is None:
        return None
    return vector.repeat(batches) if dim is None else vector.movedim(dim, 0).flatten()


def _folded_running(args: NoGradArgs, in_dims: Running | None, batches: int) -> Running | None:
    """Running statistics of B layers as those of one, in the same memory."""
    running, layer_name = args.running, args.sync.layer_name
    if running is None or in_dims is None:
        return None
    if in_dims.mean != 0 or in_dims.var != 0 or not (running.mean.is_contiguous() and running.var.is_contiguous()):
        raise InputError(
            f"vmap over {layer_name} would update the same running statistics once for each of {batches} batches: "
            f"pass separate ones, stacked as by torch.func.stack_module_state, or build the layer with "
            f"track_running_stats=False"
        )
    if running.momentum is None:
        raise InputError(f"vmap over {layer_name} does not support momentum=None")
    return running._replace(mean=running.mean.view(-1), var=running.var.view(-1))
