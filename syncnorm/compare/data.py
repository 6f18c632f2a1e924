"""scikit-learn's handwritten digits, in an order that depends on the seed and on nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

TEST_SHARE = 0.25
# The split is part of the task, not of the run: --seed changes the model and the order, never who is tested.
SPLIT_SEED = 0


@dataclass(frozen=True)
class Digits:
    """Images (N, 1, 8, 8), fp32 in [-1, 1], and labels (N,), int64, split once and for all."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


@lru_cache(maxsize=1)
def load_digits() -> Digits:
    """The 1,797 images that scikit-learn carries: 1,347 to train with, 450 to test on. Downloads nothing."""
    from sklearn.datasets import load_digits as sklearn_digits
    from sklearn.model_selection import train_test_split

    x, y = sklearn_digits(return_X_y=True)
    split = train_test_split(x, y, test_size=TEST_SHARE, random_state=SPLIT_SEED, stratify=y)
    train_x, test_x = (torch.tensor(part, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1 for part in split[:2])
    train_y, test_y = (torch.tensor(part, dtype=torch.int64) for part in split[2:])
    return Digits(train_x, train_y, test_x, test_y)


def batch_indices(num_samples: int, batch: int, seed: int) -> Iterator[Tensor]:
    """Index tensors (batch,), epoch after epoch, each shuffled anew; the incomplete last batch is dropped.

    The same for every arm and rank, so the arms see the same global batches in the same order.
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(num_samples, generator=generator)
        for start in range(0, num_samples - batch + 1, batch):
            yield order[start : start + batch]
