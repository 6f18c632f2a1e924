"""The synced layer as ``torch.compile`` sees it: one graph, in which the two collectives are operators.

Traced, the passes over a tensor are plain maths that a backend fuses with what stands around the layer. At run time
the operators make the very calls of an eager layer, so compiled and eager ranks may share statistics.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._library.effects import EffectType

from syncnorm import comm
from syncnorm.errors import SyncNormError
from syncnorm.layer import checkpointing, moments
from syncnorm.layer.kernels.cpu import corrected_moments, masked_moments, per_channel
from syncnorm.layer.statistics import global_moments

ALONE = ""  # the name of no group: this process by itself


def name_of(group: dist.ProcessGroup | None) -> str:
    """The name by which an operator finds ``group`` again: a graph can hold a name, but no group."""
    return ALONE if group is None else group.group_name


def named(group: str) -> dist.ProcessGroup | None:
    """The group of a name, as the very object that eager code has.

    A tracer makes Python objects of its own for the same group, for which nothing is remembered.

    Raises:
        SyncNormError: it was destroyed since the graph was made.
    """
    if group == ALONE:
        return None
    for known, name in dist.distributed_c10d._world.pg_names.items():
        if name == group:
            return known
    raise SyncNormError(f"the process group {group!r} of a compiled layer was destroyed: torch.compiler.reset()")


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def while_tracing(function: Callable[..., str], *args: Any) -> str:
    """``function(*args)``, called by the tracer; the graph holds what it returned.

    What it changes is changed at once. Changed by the graph it would be news to the guards, and the second step a
    second compilation.
    """
    return function(*args)


def abort_peers(what: str, text: str, group: str, device: str) -> str:
    """``collectives.refuse``; a tracer finds what is wrong with an input while it traces."""
    known = named(group)
    if known is not None:
        comm.abort_peers(what, text, known, torch.device(device), tracing=True)
    return text


@torch.library.custom_op("syncnorm::gather_moments", mutates_args=())
def gather_moments(
    mean: Tensor,
    invstd: Tensor,
    count: int,
    valid: Tensor | None,
    eps: float,
    group: str,
    layer: str,
    tracks: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``whole_batch.global_moments``.

    Args:
        mean: (C), of this rank.
        invstd: (C), of this rank.
        count: values a channel on this rank.
        valid: (), the count where there is a mask.
        eps: inside ``invstd``.
        group: its name.
        layer: its name.
        tracks: whether the graph moves running statistics, and counts.

    Returns:
        ``(mean (C), invstd (C), biased variance (C), count (), new (), number ())`` of all ranks. ``new`` is the
        count that the running statistics have not had.

    Raises:
        InputError: as ``check_count``.
        SyncNormError: as the collective.
    """
    local_count = count if valid is None else valid
    owners = checkpointing.graph_owners()
    whole, moves = global_moments(mean, invstd, local_count, eps, named(group), layer, owners, tracks=tracks)
    total = torch.as_tensor(whole.count, dtype=torch.float64, device=mean.device)
    var, new = whole.var, total.clone()
    if not moves or var is None:  # where nothing is tracked, or a checkpointed forward computed again
        var, new = torch.zeros_like(whole.mean), torch.zeros_like(total)
    # Clones, for an operator's results belong to nobody else.
    return whole.mean.clone(), whole.invstd.clone(), var.clone(), total.clone(), new, torch.tensor(whole.number)


@gather_moments.register_fake
def _(
    mean: Tensor,
    invstd: Tensor,
    count: int,
    valid: Tensor | None,
    eps: float,
    group: str,
    layer: str,
    tracks: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    number = torch.empty((), dtype=torch.int64, device="cpu")
    total, new = (mean.new_empty((), dtype=torch.float64) for _ in range(2))
    return torch.empty_like(mean), torch.empty_like(mean), torch.empty_like(mean), total, new, number


@torch.library.custom_op("syncnorm::reduce_sums", mutates_args=())
def reduce_sums(sum_dy: Tensor, sum_dy_xmu: Tensor, number: Tensor, group: str, layer: str) -> tuple[Tensor, Tensor]:
    """``collectives.reduce_sums`` of a backward; ``number`` is what :func:`gather_moments` returned."""
    with comm.reduce_sums([sum_dy, sum_dy_xmu], named(group), layer, int(number)) as finish:
        first, second = finish()
    return first.clone(), second.clone()  # an operator's results share no memory


@reduce_sums.register_fake
def _(sum_dy: Tensor, sum_dy_xmu: Tensor, number: Tensor, group: str, layer: str) -> tuple[Tensor, Tensor]:
    return torch.empty_like(sum_dy), torch.empty_like(sum_dy_xmu)


# Other ranks wait for each call: a graph keeps all of them, in order, and computes none a second time.
gather_moments.register_effect(EffectType.ORDERED)
reduce_sums.register_effect(EffectType.ORDERED)


class SyncBatchNorm(torch.autograd.Function):
    """``functional``'s autograd function for a tracer: the same maths, without what only eager code can do."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        group: str,
        padding: Tensor | None,
        layer: str,
        tracks: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Output, and ``(mean (C), biased variance (C), count ())`` that the running statistics have not had."""
        count, valid = input.numel() // input.size(1), None
        if padding is not None and count > 0:
            local_mean, local_invstd, valid = masked_moments(input, eps, padding)
        elif count > 0:
            local_mean, local_invstd = corrected_moments(input, eps)
        else:
            local_mean = input.new_zeros(input.size(1), dtype=moments.statistics_dtype(input.dtype))
            local_invstd = torch.ones_like(local_mean)
        mean, invstd, var, total, new, number = gather_moments(
            local_mean, local_invstd, count, valid, eps, group, layer, tracks
        )
        scale = invstd if weight is None else invstd * weight.to(invstd.dtype)
        y = (input - per_channel(mean, input)) * per_channel(scale, input)
        if bias is not None:
            y = y + per_channel(bias.to(mean.dtype), input)
        ctx.save_for_backward(input, weight, mean, invstd, total, number)
        ctx.group, ctx.layer = group, layer
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
        sum_dy, sum_dy_xmu = reduce_sums(sum_dy, sum_dy_xmu, number, ctx.group, ctx.layer)
        scale = invstd if weight is None else invstd * weight.to(invstd.dtype)
        slope = scale * invstd.square() * (sum_dy_xmu / count).to(invstd.dtype)
        dx = per_channel(scale, dy) * dy - per_channel(slope, dy) * (input - per_channel(mean, input))
        dx = dx - per_channel(scale * (sum_dy / count).to(invstd.dtype), dy)
        return dx.to(input.dtype), d_weight, d_bias, *(None,) * 5
