"""The layer as ``torch.compile`` sees it: one graph, in which the two collectives are custom operators.

The passes over a tensor are traced as plain math, which a backend fuses with the code around the layer. At run time
the operators make the same calls as an eager layer, so compiled and eager ranks may share statistics.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from syncnorm import _torch_versions, comm
from syncnorm.errors import SyncNormError
from syncnorm.layer import checkpointing, moments
from syncnorm.layer.arguments import NoGradArgs, Sync
from syncnorm.layer.global_moments import global_moments
from syncnorm.layer.kernels.cpu import corrected_moments, masked_moments, per_channel

T = TypeVar("T")
NO_GROUP = ""  # the name that stands for no group: this process alone


def name_of(group: dist.ProcessGroup | None) -> str:
    """The name by which an operator finds ``group`` again: a graph can hold a name, but no group."""
    return NO_GROUP if group is None else group.group_name


def group_named(name: str) -> dist.ProcessGroup | None:
    """The group of a name, as the object that eager code uses.

    A tracer makes objects of its own for the same group, for which no state is kept.

    Raises:
        SyncNormError: the group was destroyed after the graph was made.
    """
    if name == NO_GROUP:
        return None
    for group, known in dist.distributed_c10d._world.pg_names.items():
        if known == name:
            return group
    raise SyncNormError(f"the process group {name!r} of a compiled layer was destroyed: call torch.compiler.reset()")


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch leaves it untyped
def while_tracing(function: Callable[..., T], *args: Any) -> T:
    """Calls ``function(*args)`` while the tracer runs; the graph holds the result.

    What the function changes is changed at once. If the graph changed it, the guards would notice, and the second
    step would be compiled again.
    """
    return function(*args)


def in_one_graph() -> bool:
    """While the tracer runs: whether a graph break is an error, as with ``fullgraph=True``.

    Otherwise the same code runs in eager mode after one or more traces, and an error comes again.
    """
    tracer = torch._dynamo.symbolic_convert.InstructionTranslator.current_tx()
    return bool(tracer.one_graph or tracer.error_on_graph_break)


def abort_peers(reason: str, message: str, group: str, device: str) -> str:
    """``comm.abort_peers`` while the tracer runs, which finds errors in an input before any step."""
    known = group_named(group)
    if known is not None:
        comm.abort_peers(reason, message, known, torch.device(device))
    return message


@torch.library.custom_op("syncnorm::gather_moments", mutates_args=())
def gather_moments(
    mean: Tensor,
    invstd: Tensor,
    count: int,
    valid: Tensor | None,
    eps: float,
    group: str,
    layer_name: str,
    tracks: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``global_moments`` as an operator.

    Args:
        mean: (C), of this rank.
        invstd: (C), of this rank.
        count: values per channel on this rank.
        valid: (), the count if there is a mask.
        eps: inside ``invstd``.
        group: its name.
        layer_name: as of `Sync`.
        tracks: whether the graph updates running statistics.

    Returns:
        ``(mean (C), invstd (C), biased variance (C), count (), new (), number ())`` of the global batch, all on the
        device of ``mean``: a CUDA graph can hold no operator with a result on the CPU. ``new`` is the count with
        which the running statistics have yet to be updated: 0 in a recomputation.

    Raises:
        InputError: as ``check_count``.
        SyncNormError: as the collective.
    """
    local = mean, invstd, count if valid is None else valid
    sync = Sync(group_named(group), layer_name, checkpointing.graph_owners())
    whole, moves = global_moments(local, eps, sync, tracks=tracks)
    total = torch.as_tensor(whole.call.total_count, dtype=torch.float64, device=mean.device)
    number = mean.new_full((), whole.call.number, dtype=torch.int64)  # a fill: the host would wait for a copy
    var, new = whole.var, total.clone()
    if not moves or var is None:
        var, new = torch.zeros_like(whole.mean), torch.zeros_like(total)
    # An operator must not return tensors that others hold.
    return whole.mean.clone(), whole.invstd.clone(), var.clone(), total.clone(), new, number


@gather_moments.register_fake
def _(
    mean: Tensor,
    invstd: Tensor,
    count: int,
    valid: Tensor | None,
    eps: float,
    group: str,
    layer_name: str,
    tracks: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    total, new, number = (mean.new_empty((), dtype=t) for t in (torch.float64, torch.float64, torch.int64))
    return torch.empty_like(mean), torch.empty_like(mean), torch.empty_like(mean), total, new, number


@torch.library.custom_op("syncnorm::reduce_sums", mutates_args=())
def reduce_sums(
    sum_dy: Tensor, sum_dy_xmu: Tensor, number: Tensor, group: str, layer_name: str
) -> tuple[Tensor, Tensor]:
    """``comm.reduce_sums`` of a backward; ``number`` is what :func:`gather_moments` returned."""
    known = int(number) if number.is_cpu else number  # the host would wait for a GPU
    with comm.reduce_sums([sum_dy, sum_dy_xmu], group_named(group), layer_name, known) as finish:
        first, second = finish()
    return first.clone(), second.clone()  # the results of an operator must not share memory


@reduce_sums.register_fake
def _(sum_dy: Tensor, sum_dy_xmu: Tensor, number: Tensor, group: str, layer_name: str) -> tuple[Tensor, Tensor]:
    return torch.empty_like(sum_dy), torch.empty_like(sum_dy_xmu)


# Other ranks wait for each call: a graph must keep all of them, in order, and repeat none.
_torch_versions.register_ordered(gather_moments)
_torch_versions.register_ordered(reduce_sums)


def batch_norm(input: Tensor, weight: Tensor | None, bias: Tensor | None, args: NoGradArgs) -> Tensor:
    """The output, as that of ``autograd.SyncBatchNormFunction``; the graph updates ``args.running``."""
    group, running = name_of(args.sync.group), args.running
    output, mean, var, count = _CompiledFunction.apply(  # type: ignore[no-untyped-call]  # torch leaves it untyped
        input, weight, bias, args.eps, group, args.padding, args.sync.layer_name, running is not None
    )
    if running is not None:
        moments.update_running_(running, mean, var, count)
    return output  # type: ignore[no-any-return]  # torch leaves it untyped


def moments_in_one_read(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``corrected_moments`` in one pass over x, once a compiler has fused the operators.

    Compiled, ``var_mean`` is Welford's algorithm in fp32, which loses digits if the mean is far above the standard
    deviation. Differences from a value of the channel do not: of n values none is farther from their mean than
    sqrt(n) standard deviations, and most are much nearer.

    Args:
        x: (batch, C, *spatial), not empty.
        eps: added to the variance.
    """
    dims = [d for d in range(x.dim()) if d != 1]
    wide = x.to(moments.statistics_dtype(x.dtype))
    pivot = wide
    for d in dims:
        pivot = pivot.narrow(d, 0, 1)
    var, mean = torch.var_mean(wide - pivot, dims, correction=0)
    return mean + pivot.flatten(), torch.rsqrt(var + eps)


class _CompiledFunction(torch.autograd.Function):
    """``autograd.SyncBatchNormFunction`` for a tracer: the same math, in operators that it can follow."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        group: str,
        padding: Tensor | None,
        layer_name: str,
        tracks: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Output, and ``(mean (C), biased variance (C), count ())`` for the update of the running statistics."""
        count, valid = input.numel() // input.size(1), None
        if padding is not None and count > 0:
            local_mean, local_invstd, valid = masked_moments(input, eps, padding)
        elif count > 0:
            # A GPU is bound by its memory. On a CPU the divisions of Welford's algorithm take longer than a read.
            local_moments = corrected_moments if input.device.type == "cpu" else moments_in_one_read
            local_mean, local_invstd = local_moments(input, eps)
        else:
            local_mean = input.new_zeros(input.size(1), dtype=moments.statistics_dtype(input.dtype))
            local_invstd = torch.ones_like(local_mean)
        mean, invstd, var, total, new, number = gather_moments(
            local_mean, local_invstd, count, valid, eps, group, layer_name, tracks
        )
        scale = invstd if weight is None else invstd * weight.to(invstd.dtype)
        y = (input - per_channel(mean, input)) * per_channel(scale, input)
        if bias is not None:
            y = y + per_channel(bias.to(mean.dtype), input)
        ctx.save_for_backward(input, weight, mean, invstd, total, number)
        ctx.group, ctx.layer_name = group, layer_name
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.mark_non_differentiable(mean, var, new)
        return y.to(input.dtype), mean, var, new

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        """Gradients of input, weight and bias; those of the parameters are this rank's."""
        input, weight, mean, invstd, count, number = ctx.saved_tensors
        dims = [d for d in range(input.dim()) if d != 1]
        sum_dy = dy.sum(dims, dtype=mean.dtype)
        sum_dy_xmu = (dy * (input - per_channel(mean, input))).sum(dims)
        d_weight = None if weight is None else (sum_dy_xmu * invstd).to(weight.dtype)
        d_bias = None if ctx.bias_dtype is None else sum_dy.to(ctx.bias_dtype)
        sum_dy, sum_dy_xmu = reduce_sums(sum_dy, sum_dy_xmu, number, ctx.group, ctx.layer_name)
        scale = invstd if weight is None else invstd * weight.to(invstd.dtype)
        slope = scale * invstd.square() * (sum_dy_xmu / count).to(invstd.dtype)
        dx = per_channel(scale, dy) * dy - per_channel(slope, dy) * (input - per_channel(mean, input))
        dx = dx - per_channel(scale * (sum_dy / count).to(invstd.dtype), dy)
        return dx.to(input.dtype), d_weight, d_bias, *(None,) * 5
