"""How far apart the ranks' statistics lie in each norm layer of a model with local batch norm.

Shapes: W = ranks, C = channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite, sqrt
from typing import NamedTuple

import torch
from torch import Tensor, nn

from syncnorm.monitor.divergence import rank_divergence
from syncnorm.tools.common.data import Batches
from syncnorm.tools.common.ranks import Ranks
from syncnorm.tools.compare.evidence import LayerSpread

BATCHES = 4


class _Moments(NamedTuple):
    mean_C: Tensor
    var_C: Tensor
    num_values: int


@torch.no_grad()
def measure_spread(
    model: nn.Module, layers: Sequence[str], batches: Batches, ranks: Ranks
) -> tuple[LayerSpread, ...]:
    """Sends a few batches through ``model`` in training mode, and compares what its norm layers are given.

    Running statistics change. Collective: all ranks, one object gather.
    """
    seen: dict[str, list[_Moments]] = {name: [] for name in layers}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: seen[name].append(_moments(args[0]))
        )
        for name in layers
    ]
    try:
        model.train()
        for _ in range(BATCHES):
            inputs, _ = batches.next()
            model(inputs.to(ranks.device))
    finally:
        for hook in hooks:
            hook.remove()
    everywhere = ranks.collect(seen)
    return tuple(_of_layer(name, [rank[name] for rank in everywhere]) for name in layers)


def _moments(x: Tensor) -> _Moments:
    dims = [d for d in range(x.dim()) if d != 1]
    var_C, mean_C = torch.var_mean(x.double(), dims, correction=0)
    return _Moments(mean_C.cpu(), var_C.cpu(), x.numel() // max(1, x.shape[1]))


def _of_layer(name: str, of_rank: list[list[_Moments]]) -> LayerSpread:
    found = [
        rank_divergence(
            torch.stack([m.mean_C for m in call]),
            torch.stack([m.var_C for m in call]),
            torch.tensor([m.num_values for m in call]),
        )
        for call in zip(*of_rank, strict=True)
    ]
    return LayerSpread(name, _root_mean_square([s.mean for s in found]), _root_mean_square([s.var for s in found]))


def _root_mean_square(values: list[float]) -> float | None:
    finite = [value for value in values if isfinite(value)]
    return sqrt(sum(value**2 for value in finite) / len(finite)) if finite else None
