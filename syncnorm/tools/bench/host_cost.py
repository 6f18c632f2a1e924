"""What a rank itself does for a step in a large world, measured without the world: on torch's ``fake`` group.

Its collectives return at once and leave each rank's row filled with this rank's own, so the layer merges as many
rows as the world has ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

import torch
import torch.distributed as dist

from syncnorm.modules import SyncBatchNorm2d
from syncnorm.tools.bench.growth import BATCH, SIDE, Key, timed_in_blocks
from syncnorm.tools.bench.growth_records import HostSample
from syncnorm.tools.bench.layers import LayerStep, make_inputs
from syncnorm.tools.bench.lone import fake_world
from syncnorm.tools.bench.measure import Step, warm_up

# The last but one is for checking the fit to the others.
WORLDS, QUICK_WORLDS = (2, 8, 64, 256, 512, 1024), (2, 8, 32, 64)
CHANNELS, QUICK_CHANNELS = (16, 64, 256, 1024), (16, 64)
# Shorter than where processes wait for each other: nothing here does, and there is much to measure.
BLOCK_SECONDS = 0.005

# torch 2.13 renames all_gather_into_tensor and warns of the old name, the only one that 2.11 knows.
_all_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True)
class Collectives:
    """The group's part of a layer's step, to be taken off: the fake gather writes row by row, which no backend does.

    With the memory of the gather allocated each time, as the layer has it.
    """

    group: dist.ProcessGroup
    channels: int

    def __call__(self) -> None:
        """A gather and a sum of what the layer gathers and sums."""
        packed, sums = torch.ones(2 * self.channels + 2), torch.ones(2 * self.channels + 1)
        _all_gather_into(packed.new_empty(self.group.size() * packed.numel()), packed, group=self.group)
        dist.all_reduce(sums, group=self.group)


@dataclass(frozen=True)
class SumOfRows:
    """What is to be added: over gloo a rank adds up the backward's rows itself, where the fake group's are summed."""

    rows_WP: torch.Tensor

    def __call__(self) -> None:
        """Over the ranks."""
        self.rows_WP.sum(0)


def measure_host(repetitions: int, quick: bool) -> tuple[tuple[HostSample, ...], tuple[HostSample, ...]]:
    """Times a layer's step in fake worlds, in this process, which must have no process group.

    Returns:
        The samples to fit to, and those of one world to check the fit against.
    """
    worlds, channels = (QUICK_WORLDS, QUICK_CHANNELS) if quick else (WORLDS, CHANNELS)
    with fake_world(max(worlds), torch.device("cpu")) as ranks:
        steps: dict[Key, Step] = {}
        for world_size in worlds:
            group = dist.new_group(list(range(world_size)), backend="fake")
            for width in channels:
                inputs = make_inputs((BATCH, width, SIDE, SIDE), "contiguous", "fp32", ranks.device, seed=0)
                layer = SyncBatchNorm2d(width, process_group=group)
                steps["step", world_size, width] = LayerStep(layer, inputs)
                steps["collectives", world_size, width] = Collectives(group, width)
                steps["rows", world_size, width] = SumOfRows(torch.ones(world_size, 2 * width))
        warm_up({"/".join(map(str, key)): step for key, step in steps.items()})
        timed = timed_in_blocks(steps, ranks, repetitions, BLOCK_SECONDS)
    seconds = {key: times for key, (_, times) in timed.items()}
    samples = {w: tuple(HostSample(w, c, _host(seconds, w, c)) for c in channels) for w in worlds}
    left_out = samples.pop(worlds[-2])
    return tuple(sample for of_world in samples.values() for sample in of_world), left_out


def _host(seconds: Mapping[Key, tuple[float, ...]], world_size: int, channels: int) -> float:
    step, collectives, rows = (seconds[what, world_size, channels] for what in ("step", "collectives", "rows"))
    return median(s - c + r for s, c, r in zip(step, collectives, rows, strict=True))
