"""The ranks of a command: those that a launcher started, or gloo processes of our own."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from syncnorm.errors import InputError
from syncnorm.hardware import Hardware, hardware_of
from syncnorm.launcher import launched_world_size

DEFAULT_RANKS = 2

# Ranks that have no part in an arm wait for rank 0 to train it, however long the user lets that take.
WAIT = timedelta(days=1)

T = TypeVar("T")


def _to_nobody(found: Sequence[Any]) -> None:
    """Nothing."""


@dataclass(frozen=True)
class Ranks:
    """This process among the others, its device, and a gloo group to wait and talk in.

    The waiting has a group of its own: on NCCL a waiting rank would keep its GPU busy, and the group's
    default timeout would end a long reference run. ``hand_in`` takes what this process has found, piece by piece,
    lest all of it be lost when a later piece fails.
    """

    rank: int
    world_size: int
    device: torch.device
    backend: str
    control: dist.ProcessGroup
    hand_in: Callable[[Sequence[Any]], None] = _to_nobody

    def wait(self) -> None:
        """Returns once every rank has called it. Collective: all ranks, one barrier."""
        dist.barrier(group=self.control)

    def share(self, record: T | None) -> T:
        """Rank 0's record, on every rank. Collective: all ranks, one object broadcast."""
        box = [record]
        dist.broadcast_object_list(box, src=0, group=self.control)
        assert box[0] is not None
        return box[0]

    def collect(self, record: T) -> list[T]:
        """Every rank's record, on every rank. Collective: all ranks, one object gather."""
        box: list[T | None] = [None] * self.world_size
        dist.all_gather_object(box, record, group=self.control)
        return [each for each in box if each is not None]

    def hardware(self) -> Hardware:
        """What this rank runs on."""
        return hardware_of(self.device, self.backend)


@contextmanager
def initialised_ranks(device: torch.device, wait: timedelta = WAIT) -> Iterator[Ranks]:
    """`Ranks` of the process group that exists already; in ``control`` they wait for each other up to ``wait``.

    Collective: all ranks, one ``new_group``.
    """
    control = dist.new_group(backend="gloo", timeout=wait)
    assert isinstance(control, dist.ProcessGroup)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), device, dist.get_backend(), control)
    finally:
        dist.destroy_process_group(control)


@contextmanager
def launched_ranks(cpu: bool = False, wait: timedelta = WAIT) -> Iterator[Ranks]:
    """`Ranks` of a launcher's environment, on the devices and the backend that accelerate picks for them.

    Gloo on the CPU if ``cpu``, and where the node has fewer GPUs than ranks: NCCL refuses two ranks on one GPU.
    Collective: all ranks.
    """
    from accelerate import PartialState

    ours = not dist.is_initialized()
    state = PartialState(cpu=cpu or not a_gpu_for_each_launched_rank())
    try:
        # accelerate numbers CPUs ("cpu:0"), which DDP takes for a device to pin the module to.
        with initialised_ranks(state.device if state.device.type == "cuda" else torch.device("cpu"), wait) as ranks:
            yield ranks
    finally:
        if ours:
            state.destroy_process_group()


def a_gpu_for_each_launched_rank() -> bool:
    """Whether this node has as many GPUs as a launcher started ranks on it."""
    return torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))


def world_size_for(command: str, ranks: int | None, least: int = 2) -> int:
    """How many ranks ``command`` has: the launcher's, or those that it is to start, 2 by default.

    Raises:
        InputError: fewer than ``least``, or not as many as the launcher started.
    """
    launched = launched_world_size()
    if launched is not None and ranks not in (None, launched):
        raise InputError(f"asked for {ranks} ranks, but the launcher started {launched}: leave the number out")
    world_size = launched or (DEFAULT_RANKS if ranks is None else ranks)
    if world_size < least:
        fix = "start it with torchrun --nproc-per-node 2" if launched else "ask for --ranks 2"
        raise InputError(f"{command} needs at least {least} ranks, got {world_size}: {fix}")
    return world_size
