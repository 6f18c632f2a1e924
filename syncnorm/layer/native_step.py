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
        and not args.sync.graph_owners
        and not checkpointing.is_recording()
        and not checkpointing.in_backward()
        and input.numel() > 0
        and (running is None or native.can_track(running))
        and comm.exchange_of(group, _CPU) is not None
    )


def forward(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, args: NoGradArgs
) -> tuple[Tensor, Tensor, Tensor, ForwardCall]:
    """``(output, mean (C), invstd (C), call)`` with the statistics of the global batch. Collective: one exchange."""
    x = kernels.dense(input, kernels.memory_format(input))
    y = torch.empty_like(x)
    channels, eps = x.size(1), args.eps
    statistics = torch.empty((2, channels), dtype=torch.float32, device=_CPU)
    mean, invstd = statistics.unbind(0)
    count = x.numel() // channels
    native.moments_into(mean.data_ptr(), invstd.data_ptr(), x, eps)
    group, layer_name, _ = args.sync
    rows, counts, number = comm.gather_moments((statistics,), count, eps, group, layer_name)
    check_count(counts, count)
    assert not isinstance(counts, Tensor)
    native.merge_into((mean, invstd, None), rows, counts, eps, args.running)
    native.normalize(x, mean, invstd, weight, bias, y)
    return y, mean, invstd, ForwardCall(sum(counts), group, layer_name, number)


def backward(
    dy: Tensor,
    input: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    call: ForwardCall,
    bias_dtype: torch.dtype | None,
    needed: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of input, weight and bias; arguments as of ``autograd.backward``. Collective: one exchange."""
    x = kernels.dense(input, kernels.memory_format(input))
    dy = kernels.dense(dy, kernels.memory_format(x))
    sums = torch.empty((2, mean.size(0)), dtype=torch.float32, device=_CPU)
    sum_dy, sum_dy_xmu = sums.unbind(0)
    native.reduce_into(sum_dy.data_ptr(), sum_dy_xmu.data_ptr(), dy, x, mean)
    # Of this rank alone: DDP averages the gradients of parameters over ranks.
    d_bias = sum_dy.to(bias_dtype, copy=True) if needed[2] else None
    d_weight = (sum_dy_xmu * invstd).to(weight.dtype) if weight is not None and needed[1] else None
    assert call.group is not None
    rows = comm.gather_sums(sums, call.group, call.layer_name, call.number)
    dx = None
    if needed[0]:
        native.sum_rows_into(sums.data_ptr(), rows)
        dx = native.finish_grad(dy, x, mean, invstd, weight, sum_dy, sum_dy_xmu, call.total_count)
    return dx, d_weight, d_bias
