"""The memory under a batch norm: how fast it is, and how much of it a cache hides."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from syncnorm.tools.bench.measure import interleaved, warm_up
from syncnorm.tools.bench.records import Memory
from syncnorm.tools.common.ranks import Ranks

# Of the input's size. Forward: read for the statistics, read and written to normalise. Backward: x and dy read for
# the sums, both read and dx written to apply them.
PASSES = 8
# Of the tensor that is copied: far beyond any cache, far below any memory.
COPIED_BYTES = {"cuda": 2**30, "cpu": 2**27}
COPIES, REPETITIONS = 3, 9
# The sets of inputs that take turns are this much larger than the cache, so that it holds none when its turn comes.
OUTGROWN = 4
# Enough where tensors are so small that launches are all the cost.
MAX_SETS = 1024
# An H100's, where torch does not tell.
LARGE_L2 = 50 * 2**20


@dataclass
class Copy:
    """A copy of a tensor of ``num_bytes`` on ``device``."""

    num_bytes: int
    device: torch.device
    _x: Tensor = field(init=False)
    _y: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self._x = torch.ones(self.num_bytes // 4, device=self.device)
        self._y = torch.zeros_like(self._x)

    def __call__(self) -> None:
        """Reads ``num_bytes`` and writes as many."""
        self._y.copy_(self._x)


def measure_memory(ranks: Ranks) -> Memory:
    """Times copies on all ranks at once, as their steps run at once. Collective: all ranks."""
    copy = Copy(COPIED_BYTES[ranks.device.type], ranks.device)
    steps = {"copy": copy}
    warm_up(steps)
    seconds = median(interleaved(steps, ranks, REPETITIONS, COPIES)["copy"])
    return Memory(2 * copy.num_bytes / seconds, cache_size(ranks.device))


def cache_size(device: torch.device) -> int | None:
    """Bytes of the largest cache of ``device``; None where the system does not tell."""
    if device.type == "cuda":
        return getattr(torch.cuda.get_device_properties(device), "L2_cache_size", None)
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((_in_bytes(path.read_text().strip()) for path in sizes), default=None)


def cache_to_outgrow(device: torch.device) -> int:
    """Bytes of a cache that must not answer for the memory: a GPU's, which in a training is full of other layers.

    On CPUs none: activations that a core's own cache holds are there in a training too.
    """
    return (cache_size(device) or LARGE_L2) if device.type == "cuda" else 0


def input_sets(set_bytes: int, cache_bytes: int) -> int:
    """How many sets of inputs take turns.

    Args:
        set_bytes: of one set.
        cache_bytes: of the cache that all of them are to outgrow; 0 for none.

    Example:
        >>> input_sets(30, cache_bytes=50), input_sets(30, cache_bytes=0)
        (7, 1)
    """
    return min(MAX_SETS, max(1, ceil(OUTGROWN * cache_bytes / set_bytes)))


def _in_bytes(text: str) -> int:
    """Of ``"32768K"``, as Linux writes it."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    return int(text.rstrip("KMG")) * units.get(text[-1], 1)
