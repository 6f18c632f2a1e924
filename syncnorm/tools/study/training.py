"""The loop that every image study trains with, and the test at its end."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Recipe:
    """SGD with momentum 0.9.

    Attributes:
        lr: learning rate of the first step.
        steps: optimiser steps.
        decay: whether the rate falls to zero along a cosine, or stays.
    """

    lr: float
    steps: int
    decay: bool = True
    momentum: float = 0.9

    def rate(self, step: int) -> float:
        """The learning rate of ``step``, counted from 0."""
        return self.lr * 0.5 * (1 + math.cos(math.pi * step / self.steps)) if self.decay else self.lr


def fit(
    module: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    recipe: Recipe,
    after_step: Callable[[int], None] | None = None,
) -> None:
    """Trains ``module`` on the first ``recipe.steps`` of ``batches``, images and labels.

    The loss is the mean over the rank's images. DDP averages gradients over ranks, so with equal batches the
    gradient is that of the mean over the global batch.

    Args:
        module: the model, wrapped or not.
        batches: this rank's.
        recipe: how.
        after_step: called with the number of steps done; it may evaluate.

    Collective: what the wrapper and the norm layers issue.
    """
    optimizer = torch.optim.SGD(module.parameters(), lr=recipe.lr, momentum=recipe.momentum, fused=True)
    for step, (x, y) in enumerate(islice(batches, recipe.steps)):
        module.train()
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        optimizer.zero_grad()
        torch.autograd.backward(F.cross_entropy(module(x), y))
        optimizer.step()
        if after_step is not None:
            after_step(step + 1)


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of the images that ``model`` classifies right, in eval mode, without communication.

    A model whose training diverged says the same of every image, and gets what chance gets.
    """
    model.eval()
    return float((model(x).argmax(dim=1) == y).double().mean())
