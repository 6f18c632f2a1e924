"""Batches in an order that depends on the seed alone, and the demo's data: scikit-learn's digits."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset, default_collate

Collate = Callable[[list[Any]], Any]

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


def collate(items: Sequence[Any]) -> Any:
    """Torch's ``default_collate``, also for tuples and dicts of tensors; pairs become a pair (a tuple)."""
    batch = default_collate([tuple(item) if isinstance(item, list) else item for item in items])
    return tuple(batch) if isinstance(batch, list) else batch


def pieces(places: range, number: int) -> list[range]:
    """``places`` in ``number`` consecutive pieces, whose sizes differ by at most one; the larger ones come first.

    Example:
        >>> pieces(range(5), 2)
        [range(0, 3), range(3, 5)]
    """
    size, more = divmod(len(places), number)
    ends = [index * size + min(index, more) for index in range(number + 1)]
    return [places[start:end] for start, end in pairwise(ends)]


class Batches:
    """This rank's part of each global batch, collated: one batch per step, or several micro-batches.

    Each item is drawn under a seed that depends on the step and on the item's place in the global batch, so that
    random augmentation gives the same item on whichever rank, in whichever arm and in whichever process it is loaded.

    Args:
        dataset: map-style.
        batch: number of samples in the global batch.
        part: which of them this rank gets.
        seed: of the order of the samples.
        collate: list of items -> batch.
        num_workers: processes that load the items; 0 loads them in this one.
        micro_batches: number of micro-batches that the part of a step is split into, see `pieces`.

    Attributes:
        shares: of each micro-batch of a step in the samples of the part.
    """

    def __init__(
        self,
        dataset: Any,
        batch: int,
        part: slice,
        seed: int,
        collate: Collate = collate,
        num_workers: int = 0,
        micro_batches: int = 1,
    ) -> None:
        places = range(batch)[part]
        split = pieces(places, micro_batches)
        self.shares = [len(piece) / len(places) for piece in split]
        draws = _draws(len(dataset), batch, split, seed)
        self._batches: Iterator[Any]
        if num_workers:
            loader: DataLoader[Any] = DataLoader(
                _Drawn(dataset),
                batch_sampler=_Endless(draws),
                num_workers=num_workers,
                collate_fn=collate,
                # A rank that was spawned would spawn its workers too, which import torch again: seconds for each.
                multiprocessing_context="fork" if sys.platform == "linux" else None,
            )
            self._batches = iter(loader)
        else:
            drawn = _Drawn(dataset)
            self._batches = (collate([drawn[draw] for draw in of_batch]) for of_batch in draws)

    def next(self) -> Any:
        """The next batch, or micro-batch."""
        return next(self._batches)


# An item's index in the data set, and the seed of its augmentation.
Draw = tuple[int, int]


def _draws(num_samples: int, batch: int, split: Sequence[range], seed: int) -> Iterator[list[Draw]]:
    """Yields what each micro-batch of each step draws, forever; ``split`` has the places of each in the batch."""
    first = int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(seed)))
    for index in batch_indices(num_samples, batch, seed):
        for places in split:
            yield [(int(index[place]), first + place) for place in places]
        first += batch


class _Drawn(Dataset[Any]):
    """A data set whose keys are draws."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, draw: Draw) -> Any:
        index, seed = draw
        seed_everything(seed)
        return self._dataset[index]


class _Endless(Sampler[list[Draw]]):
    """The batch sampler of a `DataLoader`, which calls ``iter`` once."""

    def __init__(self, draws: Iterator[list[Draw]]) -> None:
        self._draws = draws

    def __iter__(self) -> Iterator[list[Draw]]:
        return self._draws


def in_order(dataset: Any, batch: int, collate: Collate = collate) -> Iterator[tuple[int, Any]]:
    """Yields (number of samples, collated batch) for all of ``dataset``, in its order."""
    seed_everything(0)
    for start in range(0, len(dataset), batch):
        items = [dataset[i] for i in range(start, min(start + batch, len(dataset)))]
        yield len(items), collate(items)


def to_device(batch: Any, device: torch.device) -> Any:
    """``batch`` with every tensor on ``device``: also inside of lists, tuples, dicts and dataclasses."""
    if hasattr(batch, "to"):  # a tensor, or a batch that can move itself
        return batch.to(device)
    if isinstance(batch, Mapping):
        moved = {key: to_device(value, device) for key, value in batch.items()}
        return moved if type(batch) is dict else type(batch)(moved)  # type: ignore[call-arg]  # any mapping class
    if isinstance(batch, tuple | list):
        parts = [to_device(part, device) for part in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    if is_dataclass(batch) and not isinstance(batch, type):
        return replace(batch, **{f.name: to_device(getattr(batch, f.name), device) for f in fields(batch) if f.init})
    return batch


def seed_everything(seed: int) -> None:
    """Seeds the random generators of torch, Python and, if it is imported, NumPy."""
    # torch.manual_seed looks for every kind of accelerator, which takes 0.2 ms: too long for each item of each batch.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch leaves it untyped
        torch.cuda.manual_seed(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)
