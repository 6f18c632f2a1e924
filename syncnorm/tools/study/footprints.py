"""Which values share a norm's statistics, asked of the layers themselves: change one value, see what moves."""

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

# Place of a value: rank, sample of that rank, channel, position.
Place = tuple[int, int, int, int]
AXES = ("ranks", "samples", "channels", "positions")

# Each axis of another length, and long enough to tell "all" from "some": 2 ranks of (3, 6, 4).
SAMPLES, CHANNELS, POSITIONS = 3, 6, 4
NUM_GROUPS = 2
# Valid positions of each sample, by rank; further ranks repeat these.
LENGTHS = ((4, 2, 3), (3, 4, 1))
# Not at an edge of the picture, and valid under the mask.
CHANGED: Place = (0, 1, 1, 1)


@dataclass(frozen=True)
class Footprint:
    """The outputs that one changed input value moves: all that share a statistic with it, and itself.

    Attributes:
        norm: a key of `LAYERS`.
        shape: ranks, samples a rank, channels, positions.
        changed: place of the input value.
        moved: places of the outputs.
        padding: places that the layer was told not to count.
    """

    norm: str
    shape: Place
    changed: Place
    moved: tuple[Place, ...]
    padding: tuple[Place, ...] = ()

    @property
    def reach(self) -> Place:
        """How many ranks, samples of a rank, channels and positions have an output that moved."""
        ranks, samples, channels, positions = (len({place[axis] for place in self.moved}) for axis in range(4))
        return ranks, samples, channels, positions

    @property
    def reduces_over(self) -> tuple[str, ...]:
        """Names of the axes that the norm averages over, out of `AXES`."""
        return tuple(name for name, reach in zip(AXES, self.reach, strict=True) if reach > 1)


@dataclass(frozen=True)
class Layer:
    """A norm as a layer in the place of a batch norm.

    Attributes:
        title: as a picture calls it.
        of: a batch norm -> the layer.
        masked: whether it is given the mask of `LENGTHS`.
    """

    title: str
    of: Callable[[nn.BatchNorm1d], nn.Module]
    masked: bool = False


LAYERS = {
    "bn": Layer("BN, each rank alone", lambda bn: bn),
    "sync": Layer("SyncBN", convert),
    "masked": Layer("SyncBN with a mask", convert, masked=True),
    "layer": Layer("LN", lambda bn: convert(bn, to="layer")),
    "instance": Layer("IN", lambda bn: convert(bn, to="instance")),
    "group": Layer(f"GN, {NUM_GROUPS} groups", lambda bn: convert(bn, to="group", num_groups=NUM_GROUPS)),
}


def footprints() -> list[Footprint]:
    """The `footprint` of each of `LAYERS`, over two ranks of this machine, or over those that a launcher started.

    Collective: under a launcher, all ranks.
    """
    if launched_world_size() is None:
        return run_ranks(_all_of_them)[0]
    with launched_ranks(cpu=True):
        return _all_of_them()


def _all_of_them() -> list[Footprint]:
    return [footprint(norm) for norm in LAYERS]


def footprint(norm: str, changed: Place = CHANGED) -> Footprint:
    """Runs ``norm`` in training twice, the second time with one value changed, and compares all ranks' outputs.

    Collective: all ranks of the default group, the norm's own collectives twice and one object gather. Without
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
    given = {"mask": mask} if LAYERS[norm].masked else {}
    with torch.no_grad():
        # fp64 rounds at 1e-16; what the changed value moves, it moves by some hundredths.
        moved = (layer(after, **given) - layer(before, **given)).abs() > 1e-9
    padding = (~mask).unsqueeze(1).expand_as(before) if LAYERS[norm].masked else torch.zeros_like(moved)
    return Footprint(
        norm=norm,
        shape=(world_size, SAMPLES, CHANNELS, POSITIONS),
        changed=changed,
        moved=_places(moved, rank, world_size),
        padding=_places(padding, rank, world_size),
    )


def _places(here: Tensor, rank: int, world_size: int) -> tuple[Place, ...]:
    """Where any rank's tensor is True."""
    mine: list[Place] = [(rank, s, c, p) for s, c, p in here.nonzero().tolist()]
    if not dist.is_initialized():
        return tuple(mine)
    box: list[list[Place]] = [[]] * world_size
    dist.all_gather_object(box, mine)
    return tuple(place for places in box for place in places)
