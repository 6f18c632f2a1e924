"""Images read as sequences of their columns, and the recurrent network that reads them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from syncnorm.tools.study.data import SIDE, batches, load_images

NUM_CLASSES = 10
# What padding holds until the network replaces it: a position that the mask forgot would show in every output.
PADDING = float("nan")


def columns(images: Tensor) -> list[Tensor]:
    """The columns (length, SIDE) of each image (N, 1, SIDE, SIDE), from its first ink to its last, left to right."""
    inked = (images[:, 0] > -1).any(dim=1).int()
    first, last = inked.argmax(dim=1).tolist(), (SIDE - 1 - inked.flip(1).argmax(dim=1)).tolist()
    return [image[0, :, start : stop + 1].T for image, start, stop in zip(images, first, last, strict=True)]


def padded(some: Sequence[Tensor], shortest: int = 0) -> Tensor:
    """(N, length, SIDE), filled up with `PADDING` to the longest, or to ``shortest`` where that is more."""
    length = max(shortest, *(len(each) for each in some))
    filled = torch.full((len(some), length, SIDE), PADDING)
    for row, each in zip(filled, some, strict=True):
        row[: len(each)] = each
    return filled


@dataclass(frozen=True)
class Sequences:
    """`columns` of every image, one by one to train with, `padded` to evaluate; labels (N,)."""

    train: tuple[Tensor, ...]
    train_y: Tensor
    validation_x: Tensor
    validation_y: Tensor
    test_x: Tensor
    test_y: Tensor


@lru_cache(maxsize=1)
def load_sequences() -> Sequences:
    """The images of the other studies, read as sequences."""
    images = load_images()
    validation, test = (padded(columns(x)) for x in (images.validation_x, images.test_x))
    train = tuple(columns(images.train_x))
    return Sequences(train, images.train_y, validation, images.validation_y, test, images.test_y)


def mask_of(x: Tensor) -> Tensor:
    """(N, length), True where x (N, length, SIDE) is no padding."""
    return ~x[:, :, 0].isnan()


def padded_batches(
    some: Sequence[Tensor], labels: Tensor, batch: int, seed: int, part: slice, pad_to: tuple[int, int]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of this rank's ``part``, padded as by `padded` to a length that each batch draws.

    Args:
        some: all sequences.
        labels: theirs.
        batch: of all ranks together.
        seed: of the order and of the lengths, which differ by rank.
        part: of each batch.
        pad_to: least and greatest length to draw from.
    """
    generator = torch.Generator().manual_seed(2**20 * seed + (part.start or 0))
    for index, y in batches(torch.arange(len(labels)), labels, batch, seed, part):
        least, greatest = pad_to
        length = int(torch.randint(least, greatest + 1, (), generator=generator))
        yield padded([some[i] for i in index.tolist()], length), y


class PositionNorm(nn.Module):
    """Batch norm of (N, length, C) over all positions of all sequences; converted to layer norm, of each position.

    Args:
        width: C.
        masked: whether padding is left out of the statistics; needs a synced layer.
    """

    def __init__(self, width: int, masked: bool) -> None:
        super().__init__()
        self.norm, self.masked = nn.BatchNorm1d(width), masked

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(N, length, C), mask (N, length) -> (N, length, C)."""
        positions = x.flatten(0, 1)
        kwargs = {"mask": mask.flatten()} if self.masked else {}
        normed: Tensor = self.norm(positions, **kwargs)
        return normed.view_as(x)


class Reader(nn.Module):
    """Linear, norm, GRU, norm, GRU, and a linear classifier of the last column's state.

    Padding is zero wherever a norm sees it, as it is where sequences are packed: only the norms can tell how much
    of it there is.
    """

    def __init__(self, width: int, masked: bool) -> None:
        super().__init__()
        self.embed = nn.Linear(SIDE, width, bias=False)
        self.norms = nn.ModuleList(PositionNorm(width, masked) for _ in range(2))
        self.layers = nn.ModuleList(nn.GRU(width, width, batch_first=True) for _ in range(2))
        self.classify = nn.Linear(width, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """(N, length, SIDE), padded -> (N, NUM_CLASSES)."""
        mask = mask_of(x)
        states = self.embed(x.nan_to_num())
        for norm, layer in zip(self.norms, self.layers, strict=True):
            states, _ = layer(norm(states * mask.unsqueeze(2), mask))
        last = mask.sum(dim=1) - 1
        logits: Tensor = self.classify(states[torch.arange(len(x)), last])
        return logits


def build_reader(seed: int, width: int, masked: bool) -> Reader:
    """The network with ``nn.BatchNorm1d`` layers, the same weights for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Reader(width, masked)
