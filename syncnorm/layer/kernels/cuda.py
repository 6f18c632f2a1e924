"""The passes as torch's CUDA kernels, which ``torch.nn.SyncBatchNorm`` uses too. None of them waits on the host.

Source: ATen/native/cuda/Normalization.cu; called as in torch/nn/modules/_functions.py.
"""

from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

from syncnorm.layer.kernels import cpu, launch
from syncnorm.layer.moments import Count, Running

_HALF = torch.bfloat16, torch.float16
_NARROW = torch.float32, *_HALF


def local_moments(x: Tensor, eps: float, scratch: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and invstd, each (C): Welford's algorithm in the accumulation type."""
    mean, invstd = torch.batch_norm_stats(x, eps)
    return mean, invstd


def merge(
    moments_W2C: Tensor, counts: Sequence[int] | Tensor, eps: float, running: Running | None
) -> tuple[Tensor, Tensor, Tensor, Count]:
    """In Triton's kernel if it can be used, instead of some 25 small operators."""
    supported = moments_W2C.dtype == torch.float32 and (running is None or can_track(running))
    if isinstance(counts, Tensor) and supported and launch.passes_available(moments_W2C.device):
        from syncnorm.layer.kernels import triton_forward  # not at the top: it imports a compiler

        tags = torch.zeros_like(counts)  # which agree: those of the ranks have been compared
        rows, unused = torch.cat([moments_W2C, counts, tags], dim=1), torch.empty_like(counts[0], dtype=torch.int64)
        with suppress(launch.TritonFailed):
            return triton_forward.merge(rows, eps, 0.0, unused, 0, running)
    return cpu.merge(moments_W2C, counts, eps, running)


def can_track(running: Running) -> bool:
    """Whether Triton's kernel can update the running statistics: dense ones up to fp32."""
    for v in (running.mean, running.var):
        if v.dtype not in _NARROW or not v.is_contiguous():
            return False
    tracked = running.num_batches_tracked
    return tracked is None or (tracked.dtype == torch.int64 and tracked.device == running.mean.device)


def normalize(
    x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, bias: Tensor | None, y: Tensor
) -> Tensor:
    """``(x - mean) * invstd * weight + bias`` in one pass."""
    return torch.ops.aten.batch_norm_elemt.out(  # type: ignore[no-any-return]  # torch.ops is untyped
        x, cpu.cast_like(weight, mean), cpu.cast_like(bias, mean), mean, invstd, 0.0, out=y
    )


def reduce_grad(dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor) -> tuple[Tensor, Tensor]:
    """``sum(dy)`` and ``sum(dy * (x - mean))``, each (C), in one pass."""
    if x.dtype in _HALF and x.stride(1) != 1:
        # This kernel rounds each value to half precision before it sums, unless the channel is the fastest axis: sums
        # in bf16 were wrong by up to 3 % in torch 2.11.
        dy, x = dy.float(), x.float()
    sum_dy, sum_dy_xmu, _, _ = torch.batch_norm_backward_reduce(dy, x, mean, invstd, None, True, False, False)
    return sum_dy, sum_dy_xmu


def begin_grad(dy: Tensor, invstd: Tensor, weight: Tensor | None) -> Tensor:
    """``dy``: there is one kernel, at the end."""
    return dy


def finish_grad(
    begun: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    sum_dy: Tensor,
    sum_dy_xmu: Tensor,
    count: Count,
) -> Tensor:
    """``weight * invstd * (dy - sum_dy / N - (x - mean) * invstd^2 * sum_dy_xmu / N)`` in one pass."""
    # The kernel divides by a sum of int32 counts, which 2**31 values per channel would overflow: divide here.
    one = torch.ones(1, dtype=torch.int32, device=x.device)
    return torch.batch_norm_backward_elemt(
        begun, x, mean, invstd, cpu.cast_like(weight, mean), sum_dy / count, sum_dy_xmu / count, one
    )
