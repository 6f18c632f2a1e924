"""The contenders of the benchmark: implementations of batch norm that are timed against each other.

Those of the layer benchmark take the same input, parameters and running statistics. The model benchmark compares
training steps with local batch norm, with local batch norm and bare collectives, and with the synchronized layer.
"""

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

# By number of dimensions of the input.
_LOCAL: dict[int, type[BatchNorm]] = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
_SYNCED: dict[int, type[syncnorm.SyncBatchNorm]] = {
    2: syncnorm.SyncBatchNorm1d,
    3: syncnorm.SyncBatchNorm1d,
    4: syncnorm.SyncBatchNorm2d,
    5: syncnorm.SyncBatchNorm3d,
}


@dataclass(frozen=True)
class Contender:
    """One implementation.

    Attributes:
        name: in files.
        label: in tables.
        about: one line for the legend.
        build: (dimensions of the input, channels) -> the module, on the CPU.
    """

    name: str
    label: str
    about: str
    build: Callable[[int, int], nn.Module]


class LocalAndCollectives(nn.Module):
    """Local batch norm and the two collectives that no synchronized layer can do without, on constant buffers.

    A synchronized layer is faster only if it does the normalization itself faster than the local layer.

    Collective: all ranks; one all_gather in the forward, one all_reduce in `after_backward`.
    """

    def __init__(self, dims: int, channels: int) -> None:
        super().__init__()
        self.norm = _LOCAL[dims](channels)
        # Mean, invstd, count; sum_dy and sum_dy_xmu. Allocated once, as a layer could do.
        self.packed = nn.Buffer(torch.ones(2 * channels + 1), persistent=False)
        self.sums = nn.Buffer(torch.zeros(2 * channels), persistent=False)
        self.gathered: list[Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, *) -> the same shape; the gather follows the norm."""
        y: Tensor = self.norm(x)
        if self.gathered is None:
            self.gathered = [torch.empty_like(self.packed) for _ in range(dist.get_world_size())]
        dist.all_gather(self.gathered, self.packed)
        return y

    def after_backward(self) -> None:
        """Reduces a vector of the size of ``sum_dy`` and ``sum_dy_xmu``."""
        dist.all_reduce(self.sums)


def add_bare_collectives(model: nn.Module) -> nn.Module:
    """Adds to each ``nn.BatchNorm2d`` of ``model`` an all_gather in the forward and an all_reduce in the backward.

    This is the least that synchronizing a model can cost. What a training step then takes longer than with plain DDP
    is the time that the ranks wait for each other at every layer, whatever the layer does with the data.

    Returns:
        ``model``, whose results are unchanged.

    Collective: in the forward and backward of the model, all ranks.
    """
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(_CollectivesHook(module.num_features))
    return model


class _CollectivesHook:
    def __init__(self, channels: int) -> None:
        # As in `LocalAndCollectives`.
        self.packed, self.sums = torch.ones(2 * channels + 1), torch.zeros(2 * channels)
        self.gathered: list[Tensor] = []

    def __call__(self, module: nn.Module, args: Any, y: Tensor) -> Tensor:
        if not self.gathered:
            self.packed, self.sums = self.packed.to(y.device), self.sums.to(y.device)
            self.gathered = [torch.empty_like(self.packed) for _ in range(dist.get_world_size())]
        unchanged: Tensor = _BareCollectives.apply(y, self)  # type: ignore[no-untyped-call]  # untyped in torch
        return unchanged


class _BareCollectives(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, collectives: _CollectivesHook) -> Tensor:
        ctx.collectives = collectives
        dist.all_gather(collectives.gathered, collectives.packed)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        dist.all_reduce(ctx.collectives.sums)
        return dy, None


class MeanOfSquares(nn.Module):
    """The common workaround where torch's synchronized layer does not run: E[x] and E[x^2] through an all_reduce.

    Detection repositories contain it under names like ``NaiveSyncBatchNorm``. The variance is E[x^2] - E[x]^2, which
    suffers from cancellation if the mean is large; the running variance is the biased one; all ranks must have the
    same batch size.

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
        """(N, C, *) -> the same shape and dtype; half precision is computed in fp32."""
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
    total: Tensor = _AllReduce.apply(x)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return total


class TorchSyncedInWorldOfOne(nn.SyncBatchNorm):
    """``torch.nn.SyncBatchNorm`` that synchronizes in a world of one, too, where torch's is local batch norm.

    Source: ``forward`` of torch/nn/modules/batchnorm.py, without the check of the world size.

    Collective: all ranks; one all_gather in the forward, one all_reduce in the backward.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, *) -> the same shape."""
        if not input.is_cuda:
            return super().forward(input)  # raises
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        y: Tensor = _functions.SyncBatchNorm.apply(  # type: ignore[no-untyped-call]  # torch leaves it untyped
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
    return nn.SyncBatchNorm(channels) if dist.get_world_size() > 1 else TorchSyncedInWorldOfOne(channels)


LOCAL = Contender("local", "local", "nn.BatchNorm1d/2d/3d, without communication.", lambda d, c: _LOCAL[d](c))
LOCAL_AND_COLLECTIVES = Contender(
    "floor",
    "local + collectives",
    "nn.BatchNorm and the two bare collectives that any synchronized layer needs.",
    LocalAndCollectives,
)
MEAN_OF_SQUARES = Contender(
    "E[x^2]", "E[x²]", "the common workaround, an all_reduce of E[x] and E[x²].", MeanOfSquares
)
SYNCNORM = Contender("syncnorm", "syncnorm", "SyncBatchNorm1d/2d/3d of this package.", lambda d, c: _SYNCED[d](c))
TORCH = Contender("torch", "torch", "torch.nn.SyncBatchNorm.", _torch_synced)

CONTENDERS = (LOCAL, LOCAL_AND_COLLECTIVES, MEAN_OF_SQUARES, SYNCNORM, TORCH)
# The others are measured against these.
BASELINES = (LOCAL.name, LOCAL_AND_COLLECTIVES.name, MEAN_OF_SQUARES.name, TORCH.name)
