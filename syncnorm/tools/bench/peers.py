"""The contenders of the layer benchmark: modules that take the same input, parameters and running statistics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules import _functions

import syncnorm

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d

_LOCAL: dict[int, type[BatchNorm]] = {2: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d, 3: nn.BatchNorm1d}
_SYNCED: dict[int, type[syncnorm.SyncBatchNorm]] = {
    2: syncnorm.SyncBatchNorm1d,
    3: syncnorm.SyncBatchNorm1d,
    4: syncnorm.SyncBatchNorm2d,
    5: syncnorm.SyncBatchNorm3d,
}


@dataclass(frozen=True)
class Peer:
    """One contender.

    Attributes:
        name: in tables and files.
        about: one line for the legend.
        build: (dimensions of the input, channels) -> the module, on the CPU.
    """

    name: str
    about: str
    build: Callable[[int, int], nn.Module]


class Floor(nn.Module):
    """Local batch norm, and beside it the two collectives that a synced one cannot do without.

    All that a synced layer does besides has to be won back from the local layer.

    Collective: all ranks; one all_gather in the forward, one all_reduce in `after_backward`.
    """

    def __init__(self, dims: int, channels: int) -> None:
        super().__init__()
        self.norm = _LOCAL[dims](channels)
        # Mean, invstd, count; the buffers are there before the step, as a layer could arrange.
        self.packed = nn.Buffer(torch.ones(2 * channels + 1), persistent=False)
        self.sums = nn.Buffer(torch.zeros(2 * channels), persistent=False)
        self.gathered: list[Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, *) -> the same; the gather follows the norm."""
        y: Tensor = self.norm(x)
        if self.gathered is None:
            self.gathered = [torch.empty_like(self.packed) for _ in range(dist.get_world_size())]
        dist.all_gather(self.gathered, self.packed)
        return y

    def after_backward(self) -> None:
        """The reduction of what would be ``sum_dy`` and ``sum_dy_xmu``."""
        dist.all_reduce(self.sums)


class MeanOfSquares(nn.Module):
    """The common work-around where torch's synced layer does not run: E[x] and E[x^2] through an all_reduce.

    Detection repositories have it under names like ``NaiveSyncBatchNorm``. The variance is E[x^2] - E[x]^2, which
    cancels where the mean is large; the running variance is the biased one; ranks must have the same batch size.

    Collective: all ranks; one all_reduce in the forward, one in the backward.
    """

    def __init__(self, dims: int, channels: int) -> None:
        super().__init__()
        self.eps, self.momentum = 1e-5, 0.1
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.running_mean = nn.Buffer(torch.zeros(channels))
        self.running_var = nn.Buffer(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, *) -> the same; half precision is computed in fp32."""
        dtype, x = x.dtype, x.float()
        over = [d for d in range(x.dim()) if d != 1]
        moments = torch.cat([x.mean(over), (x * x).mean(over)])
        mean, mean_of_squares = (_all_reduce(moments) / dist.get_world_size()).chunk(2)
        var = mean_of_squares - mean * mean
        with torch.no_grad():
            self.running_mean.add_(mean - self.running_mean, alpha=self.momentum)
            self.running_var.add_(var - self.running_var, alpha=self.momentum)
        scale = self.weight * torch.rsqrt(var + self.eps)
        shift = self.bias - mean * scale
        per_channel = (1, -1) + (1,) * (x.dim() - 2)
        return (x * scale.view(per_channel) + shift.view(per_channel)).to(dtype)


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        total = dy.clone()
        dist.all_reduce(total)
        return total


def _all_reduce(x: Tensor) -> Tensor:
    total: Tensor = _AllReduce.apply(x)  # type: ignore[no-untyped-call]
    return total


def _local(dims: int, channels: int) -> nn.Module:
    return _LOCAL[dims](channels)


def _synced(dims: int, channels: int) -> nn.Module:
    return _SYNCED[dims](channels)


class TorchSyncedAlone(nn.SyncBatchNorm):
    """``torch.nn.SyncBatchNorm``, which in a world of one is local batch norm; this one goes on to synchronise.

    Source: ``forward`` of torch/nn/modules/batchnorm.py, with the question for the world's size left out.

    Collective: all ranks; one all_gather in the forward, one all_reduce in the backward.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, *) -> the same."""
        if not input.is_cuda:
            return super().forward(input)  # refuses
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        y: Tensor = _functions.SyncBatchNorm.apply(  # type: ignore[no-untyped-call]
            input,
            self.weight,
            self.bias,
            self.running_mean,
            self.running_var,
            self.eps,
            self.momentum,
            dist.group.WORLD,
            dist.get_world_size(),
        )
        return y


def _torch_synced(dims: int, channels: int) -> nn.Module:
    return nn.SyncBatchNorm(channels) if dist.get_world_size() > 1 else TorchSyncedAlone(channels)


LOCAL = Peer("local", "nn.BatchNorm, which talks to nobody", _local)
FLOOR = Peer("floor", "local, and the two bare collectives that a synced layer needs", Floor)
MEAN_OF_SQUARES = Peer("E[x^2]", "the common work-around: all_reduce of E[x] and E[x^2]", MeanOfSquares)
SYNCNORM = Peer("syncnorm", "syncnorm.SyncBatchNorm", _synced)
TORCH = Peer("torch", "torch.nn.SyncBatchNorm", _torch_synced)

PEERS = (LOCAL, FLOOR, MEAN_OF_SQUARES, SYNCNORM, TORCH)
# What the others are measured against.
BASELINES = (LOCAL.name, FLOOR.name, MEAN_OF_SQUARES.name, TORCH.name)
