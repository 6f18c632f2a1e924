"""Training steps over ranks that are about to fail, and what they raise."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn

import syncnorm

ROWS = (3, 2, 0)


def net(width: int = 3000) -> nn.Module:
    """A model whose layers need frames of different sizes: ranks that are out of step would make gloo abort."""
    torch.manual_seed(0)
    layers = [nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, width), nn.BatchNorm1d(width)]
    return syncnorm.convert(nn.Sequential(*layers))


def step(model: nn.Module, seed: int = 0) -> None:
    """A forward and a backward of this rank's part of a batch."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed)).split(ROWS[:world_size])[rank]
    y = model(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(seed)))


def errors_of(*calls: Callable[[], object]) -> list[str]:
    """The error of each call as text, or "no error"."""
    errors = []
    for call in calls:
        try:
            call()
        except (syncnorm.SyncNormError, KeyboardInterrupt, RuntimeError, MemoryError) as error:
            errors.append(f"{type(error).__name__}: {error}")
        else:
            errors.append("no error")
    return errors
