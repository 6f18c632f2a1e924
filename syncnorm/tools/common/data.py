"""Batches in an order that depends on the seed alone, and the demo's data: scikit-learn's digits."""

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
# The split belongs to the data set and not to the run: --seed changes the model and the order of the batches, never
# which samples are test samples.
SPLIT_SEED = 0


@lru_cache(maxsize=1)
def digits() -> tuple[TensorDataset, TensorDataset]:
    """The 1,797 images that scikit-learn contains, 1,347 for training and 450 for testing. Downloads nothing.

    An item is an image (1, 8, 8), fp32 in [-1, 1], and its label, (), int64.
    """
    from sklearn.datasets import load_digits as sklearn_digits
    from sklearn.model_selection import train_test_split

    x, y = sklearn_digits(return_X_y=True)
    split = train_test_split(x, y, test_size=TEST_SHARE, random_state=SPLIT_SEED, stratify=y)
    train_x, test_x = (torch.tensor(part, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1 for part in split[:2])
    train_y, test_y = (torch.tensor(part, dtype=torch.int64) for part in split[2:])
    return TensorDataset(train_x, train_y), TensorDataset(test_x, test_y)


def batch_indices(num_samples: int, batch: int, seed: int) -> Iterator[Tensor]:
    """Yields index tensors (batch,) forever; each epoch is shuffled anew and drops its incomplete last batch.

    Every rank and every arm of a comparison gets the same global batches in the same order.
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(num_samples, generator=generator)
        for start in range(0, num_samples - batch + 1, batch):
            yield order[start : start + batch]


class Batches:
    """This rank's part of each global batch, inputs and targets, one batch per step.

    Each item is drawn under a seed that depends on the step and on the item's place in the global batch, so that
    random augmentation gives the same item on whichever rank and in whichever arm it is loaded.

    Args:
        dataset: map-style, of (input, target).
        batch: number of samples in the global batch.
        part: which of them this rank gets.
        seed: of the order of the samples.
    """

    def __init__(self, dataset: Any, batch: int, part: slice, seed: int) -> None:
        self._dataset, self._batch, self._part = dataset, batch, part
        self._indices = batch_indices(len(dataset), batch, seed)
        self._item_seed = int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(seed)))

    def next(self) -> Any:
        """The collated (inputs, targets) of the next step."""
        index = next(self._indices)
        first, self._item_seed = self._item_seed, self._item_seed + self._batch
        items = []
        for place in range(self._batch)[self._part]:
            seed_everything(first + place)
            items.append(self._dataset[int(index[place])])
        return collate(items)


def collate(items: Sequence[Any]) -> Any:
    """Stacks (input, target) items into (inputs, targets)."""
    return tuple(default_collate([tuple(item) for item in items]))


def in_order(dataset: Any, batch: int) -> Iterator[tuple[int, Any]]:
    """Yields (number of samples, collated batch) for all of ``dataset``, in its order."""
    seed_everything(0)
    for start in range(0, len(dataset), batch):
        items = [dataset[i] for i in range(start, min(start + batch, len(dataset)))]
        yield len(items), collate(items)


def seed_everything(seed: int) -> None:
    """Seeds the random generators of torch, Python and, if it is imported, NumPy."""
    # torch.manual_seed looks for every kind of accelerator, which takes 0.2 ms: too long for each item of each batch.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch leaves it untyped
        torch.cuda.manual_seed(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)
