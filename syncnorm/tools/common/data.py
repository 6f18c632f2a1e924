"""Batches in an order that depends on the seed and on nothing else; and the demo's data, scikit-learn's digits."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset, default_collate

TEST_SHARE = 0.25
# The split is part of the task, not of the run: --seed changes the model and the order, never who is tested.
SPLIT_SEED = 0


@lru_cache(maxsize=1)
def digits() -> tuple[TensorDataset, TensorDataset]:
    """The 1,797 images that scikit-learn carries: 1,347 to train with, 450 to test on. Downloads nothing.

    Items are an image (1, 8, 8), fp32 in [-1, 1], and its label, (), int64.
    """
    from sklearn.datasets import load_digits as sklearn_digits
    from sklearn.model_selection import train_test_split

    x, y = sklearn_digits(return_X_y=True)
    split = train_test_split(x, y, test_size=TEST_SHARE, random_state=SPLIT_SEED, stratify=y)
    train_x, test_x = (torch.tensor(part, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1 for part in split[:2])
    train_y, test_y = (torch.tensor(part, dtype=torch.int64) for part in split[2:])
    return TensorDataset(train_x, train_y), TensorDataset(test_x, test_y)


def batch_indices(num_samples: int, batch: int, seed: int) -> Iterator[Tensor]:
    """Index tensors (batch,), epoch after epoch, each shuffled anew; the incomplete last batch is dropped.

    The same for every arm and rank, so the arms see the same global batches in the same order.
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(num_samples, generator=generator)
        for start in range(0, num_samples - batch + 1, batch):
            yield order[start : start + batch]


class Batches:
    """A rank's part of each global batch, inputs and targets, step after step.

    An item that is drawn anew each time (augmentation) is drawn from a seed of its own, so that it is the same
    on whichever rank, and in whichever arm, it comes to be.

    Args:
        dataset: map-style, of (input, target).
        batch: samples of the global batch.
        part: which of them are this rank's.
        seed: of the order.
    """

    def __init__(self, dataset: Any, batch: int, part: slice, seed: int) -> None:
        self._dataset, self._batch, self._part = dataset, batch, part
        self._indices = batch_indices(len(dataset), batch, seed)
        self._item_seed = int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(seed)))

    def next(self) -> Any:
        """Collated (inputs, targets) of the next step."""
        index = next(self._indices)
        first, self._item_seed = self._item_seed, self._item_seed + self._batch
        items = []
        for place in range(self._batch)[self._part]:
            seed_everything(first + place)
            items.append(self._dataset[int(index[place])])
        return collate(items)


def collate(items: Sequence[Any]) -> Any:
    """(inputs, targets) of a batch."""
    return tuple(default_collate([tuple(item) for item in items]))


def in_order(dataset: Any, batch: int) -> Iterator[tuple[int, Any]]:
    """(number of samples, collated batch) over the whole of ``dataset``."""
    seed_everything(0)
    for start in range(0, len(dataset), batch):
        items = [dataset[i] for i in range(start, min(start + batch, len(dataset)))]
        yield len(items), collate(items)


def seed_everything(seed: int) -> None:
    """Seeds what models and data draw from: torch, Python and, where it is loaded, NumPy."""
    # torch.manual_seed asks every kind of accelerator, which takes 0.2 ms: too long for each item of each batch.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)
