"""Which values share the statistics of a norm, measured: one input value is changed, and the outputs are compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from syncnorm.conversion.convert import convert
from syncnorm.testing import run_ranks
from syncnorm.tools.common.launcher import launched_world_size
from syncnorm.tools.common.ranks import launched_ranks

# Index of a value: rank, sample of that rank, channel, position.
Index = tuple[int, int, int, int]
AXES = ("ranks", "samples", "channels", "positions")

# Axes of different lengths, long enough to distinguish "all" from "some": 2 ranks of (3, 6, 4).
SAMPLES, CHANNELS, POSITIONS = 3, 6, 4
NUM_GROUPS = 2
# Valid positions of each sample, by rank; further ranks repeat them.
LENGTHS = ((4, 2, 3), (3, 4, 1))
# Not at an edge of the picture, and not masked.
CHANGED: Index = (0, 1, 1, 1)


@dataclass(frozen=True)
class Footprint:
    """The outputs that depend on one input value: all that share a statistic with it, and its own.

    Attributes:
        norm: a key of `LAYERS`.
        shape: ranks, samples per rank, channels, positions.
        changed: index of the input value.
        moved: indices of the outputs that changed.
        padding: indices that the mask excludes.
    """

    norm: str
    shape: Index
    changed: Index
    moved: tuple[Index, ...]
    padding: tuple[Index, ...] = ()

    @property
    def reach(self) -> Index:
        """Number of ranks, samples per rank, channels and positions with an output that changed."""
        ranks, samples, channels, positions = (len({index[axis] for index in self.moved}) for axis in range(4))
        return ranks, samples, channels, positions

    @property
    def reduces_over(self) -> tuple[str, ...]:
        """Names of the axes that the norm averages over, out of `AXES`."""
        return tuple(name for name, reach in zip(AXES, self.reach, strict=True) if reach > 1)


@dataclass(frozen=True)
class NormLayer:
    """How to make a norm layer from a batch norm.

    Attributes:
        title: in the picture.
        of: batch norm -> layer.
        masked: whether the layer gets the mask of `LENGTHS`.
    """

    title: str
    of: Callable[[nn.BatchNorm1d], nn.Module]
    masked: bool = False


LAYERS = {
    "bn": NormLayer("BN, per rank", lambda bn: bn),
    "sync": NormLayer("SyncBN", convert),
    "masked": NormLayer("SyncBN with a mask", convert, masked=True),
    "layer": NormLayer("LN", lambda bn: convert(bn, to="layer")),
    "instance": NormLayer("IN", lambda bn: convert(bn, to="instance")),
    "group": NormLayer(f"GN, {NUM_GROUPS} groups", lambda bn: convert(bn, to="group", num_groups=NUM_GROUPS)),
}


def footprints() -> list[Footprint]:
    """The `footprint` of each of `LAYERS` on two ranks of this machine, or on those that a launcher started.

    Collective: under a launcher, all ranks.
    """
    if launched_world_size() is None:
        return run_ranks(_rank_footprints)[0]
    with launched_ranks(cpu=True):
        return _rank_footprints()


def _rank_footprints() -> list[Footprint]:
    return [footprint(norm) for norm in LAYERS]


def footprint(norm: str, changed: Index = CHANGED) -> Footprint:
    """Runs ``norm`` twice in training mode, with one input value changed, and compares the outputs of all ranks.

    Collective: all ranks of the default group: the collectives of the norm twice, and two object gathers. Without
    a process group this process is the only rank.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    before = torch.randn(
        SAMPLES, CHANNELS, POSITIONS, generator=torch.Generator().manual_seed(rank), dtype=torch.float64
    )
    after = before.clone()
    if rank == changed[0]:
        after[changed[1:]] += 1
    lengths = torch.tensor(LENGTHS[rank % len(LENGTHS)])
    mask = torch.arange(POSITIONS) < lengths.unsqueeze(1)
    layer = LAYERS[norm].of(nn.BatchNorm1d(CHANNELS, dtype=torch.float64))
    kwargs = {"mask": mask} if LAYERS[norm].masked else {}
    with torch.no_grad():
        # Rounding in fp64 is about 1e-16; a dependent output changes by some hundredths.
        moved = (layer(after, **kwargs) - layer(before, **kwargs)).abs() > 1e-9
    padding = (~mask).unsqueeze(1).expand_as(before) if LAYERS[norm].masked else torch.zeros_like(moved)
    return Footprint(
        norm=norm,
        shape=(world_size, SAMPLES, CHANNELS, POSITIONS),
        changed=changed,
        moved=_indices(moved, rank, world_size),
        padding=_indices(padding, rank, world_size),
    )


def _indices(here: Tensor, rank: int, world_size: int) -> tuple[Index, ...]:
    """Where the tensor ``here`` of any rank is True."""
    mine: list[Index] = [(rank, s, c, p) for s, c, p in here.nonzero().tolist()]
    if not dist.is_initialized():
        return tuple(mine)
    by_rank: list[list[Index]] = [[]] * world_size
    dist.all_gather_object(by_rank, mine)
    return tuple(index for indices in by_rank for index in indices)
