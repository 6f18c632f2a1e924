"""The least that synchronising a model can cost: its local batch norms, with two bare collectives at each.

What a training step then takes beyond plain DDP is the price of the ranks' waiting for each other at every layer,
whatever the layer does with what it gets.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def add_bare_collectives(model: nn.Module) -> nn.Module:
    """Gives each ``nn.BatchNorm2d`` of ``model`` an all_gather in the forward and an all_reduce in the backward.

    Returns:
        ``model``, whose results are as before.

    Collective: in the model's forward and backward, all ranks.
    """
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(_Collectives(module.num_features))
    return model


class _Collectives:
    def __init__(self, channels: int) -> None:
        # Mean, invstd and count; sum_dy and sum_dy_xmu. Made once, as a layer could arrange.
        self.packed, self.sums = torch.ones(2 * channels + 1), torch.zeros(2 * channels)
        self.gathered: list[Tensor] = []

    def __call__(self, module: nn.Module, args: Any, y: Tensor) -> Tensor:
        if not self.gathered:
            self.packed, self.sums = self.packed.to(y.device), self.sums.to(y.device)
            self.gathered = [torch.empty_like(self.packed) for _ in range(dist.get_world_size())]
        through: Tensor = _Through.apply(y, self)  # type: ignore[no-untyped-call]
        return through


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, collectives: _Collectives) -> Tensor:
        ctx.collectives = collectives
        dist.all_gather(collectives.gathered, collectives.packed)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        dist.all_reduce(ctx.collectives.sums)
        return dy, None
