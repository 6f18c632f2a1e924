"""The usual step on a CPU in few calls: the passes and the merge in C, around the two exchanges.

It computes what ``autograd.forward`` and ``autograd.backward`` compute, which are easier to read. They remain for
padding, empty ranks, activation checkpointing, second derivatives, and other devices, dtypes and transports. For some
ten thousand values, their many small operators take several times as long as the passes do.
"""

import torch
from torch import Tensor

from syncnorm import comm
from syncnorm.layer import checkpointing, kernels
from syncnorm.layer.arguments import ForwardCall, NoGradArgs
from syncnorm.layer.checks import check_count
from syncnorm.layer.kernels import native

_CPU = torch.device("cpu")


def applies(input: Tensor, weight: Tensor | None, bias: Tensor | None, args: NoGradArgs) -> bool:
    """Whether this call is a usual one."""
    running, group = args.running, args.sync.group
    return (
        kernels.passes_for(input, weight, bias) is native
        and group is not None
        and args.padding is None
        and args.sync.window is None
        and not args.sync.graph_owners
        and not checkpointing.is_recording()
        and not checkpointing.in_backward()
        and input.numel() > 0
        and (running is None or native.can_track(running))
        and comm.peers_of(group).carries(_CPU)  # the first call of all connects them, the usual way
    )


def forward(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, args: NoGradArgs
) -> tuple[Tensor, Tensor, ForwardCall]:
    """``(output, statistics (2, C), call)``: mean and invstd of the global batch. Collective: one exchange."""
    x = kernels.dense(input, kernels.memory_format(input))
    y = torch.empty_like(x)
    channels, eps = x.size(1), args.eps
    count = x.numel() // channels
    statistics = torch.empty((2, channels), dtype=torch.float32, device=_CPU)
    mean = statistics.data_ptr()  # addresses, because views would take as long as a pass
    invstd = mean + 4 * channels
    native.moments_at(mean, invstd, x, eps)
    group, layer_name = args.sync[:2]
    rows, counts, number = comm.gather_moments((statistics,), count, eps, group, layer_name)
    check_count(counts, count)
    assert not isinstance(counts, Tensor)
    native.merge_at(mean, invstd, None, rows, counts, eps, args.running)
    native.normalize_at(mean, invstd, x, weight, bias, y)
    return y, statistics, ForwardCall(sum(counts), group, layer_name, number)


def can_differentiate(dy: Tensor, input: Tensor, weight: Tensor | None, statistics: Tensor) -> bool:
    """Whether these are what :func:`backward` reads: hooks of saved tensors may return anything."""
    return (
        kernels.passes_for(dy, input, weight, statistics) is native
        and dy.dtype == input.dtype
        and statistics.dtype == torch.float32
        and statistics.shape == (2, input.size(1))
        and statistics.is_contiguous()
    )


def backward(
    dy: Tensor,
    input: Tensor,
    weight: Tensor | None,
    statistics: Tensor,
    call: ForwardCall,
    bias_dtype: torch.dtype | None,
    needed: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of input, weight and bias. Collective: one exchange.

    Args:
        dy: like ``input``, of any strides.
        input: of the forward.
        weight: (C) or None.
        statistics: (2, C), as returned by the forward.
        call: as returned by the forward.
        bias_dtype: None without a bias.
        needed: which of input, weight and bias need a gradient.
    """
    x = kernels.dense(input, kernels.memory_format(input))
    dy = kernels.dense(dy, kernels.memory_format(x))
    channels = x.size(1)
    mean = statistics.data_ptr()
    invstd = mean + 4 * channels
    sums = torch.empty((2, channels), dtype=torch.float32, device=_CPU)
    sum_dy = sums.data_ptr()
    sum_dy_xmu = sum_dy + 4 * channels
    native.reduce_at(sum_dy, sum_dy_xmu, dy, x, mean)
    d_weight, d_bias = None, None
    if needed[1] or needed[2]:
        # Of this rank alone: DDP averages the gradients of parameters over ranks.
        d_weight, d_bias = native.parameter_gradients(sum_dy, invstd, channels)
        d_weight = _cast(d_weight, weight.dtype) if weight is not None and needed[1] else None
        d_bias = _cast(d_bias, bias_dtype) if needed[2] else None
    assert call.group is not None
    rows = comm.gather_sums(sums, call.group, call.layer_name, call.number)
    dx = None
    if needed[0]:
        native.sum_rows_at(sum_dy, rows)
        dx = native.finish_at(mean, invstd, dy, x, weight, sum_dy, sum_dy_xmu, call.total_count)
    return dx, d_weight, d_bias


def _cast(gradient: Tensor, dtype: torch.dtype | None) -> Tensor:
    return gradient if dtype == torch.float32 else gradient.to(dtype)  # which takes its time even if there is no work
