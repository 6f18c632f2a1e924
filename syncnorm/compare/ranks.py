"""The ranks of a comparison or a benchmark: those that a launcher started, or gloo processes of our own."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from syncnorm.compare.records import Hardware
from syncnorm.errors import InputError
from syncnorm.launcher import launched_world_size

DEFAULT_RANKS = 2

# Ranks that have no part in an arm wait for rank 0 to train it, however long the user lets that take.
WAIT = timedelta(days=1)

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among the others, its device, and a gloo group to wait and talk in.

    The waiting has a group of its own: on NCCL a waiting rank would keep its GPU busy, and the group's
    default timeout would end a long reference run.
    """

    rank: int
    world_size: int
    device: torch.device
    backend: str
    control: dist.ProcessGroup

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


def hardware_of(device: torch.device, backend: str) -> Hardware:
    """What this process runs on."""
    return Hardware(
        device=device.type,
        device_name=torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        backend=backend,
        cpu_count=cpu_count(),
        threads_per_rank=torch.get_num_threads(),
    )


def cpu_count() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def initialised_ranks(device: torch.device) -> Iterator[Ranks]:
    """`Ranks` of the process group that exists already. Collective: all ranks, one ``new_group``."""
    control = dist.new_group(backend="gloo", timeout=WAIT)
    assert isinstance(control, dist.ProcessGroup)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), device, dist.get_backend(), control)
    finally:
        dist.destroy_process_group(control)


@contextmanager
def launched_ranks(cpu: bool = False) -> Iterator[Ranks]:
    """`Ranks` of a launcher's environment, on the devices and the backend that accelerate picks for them.

    Gloo on the CPU if ``cpu``, and where the node has fewer GPUs than ranks: NCCL refuses two ranks on one GPU.
    Collective: all ranks.
    """
    from accelerate import PartialState

    ours = not dist.is_initialized()
    state = PartialState(cpu=cpu or not a_gpu_for_each_launched_rank())
    try:
        # accelerate numbers CPUs ("cpu:0"), which DDP takes for a device to pin the module to.
        with initialised_ranks(state.device if state.device.type == "cuda" else torch.device("cpu")) as ranks:
            yield ranks
    finally:
        if ours:
            state.destroy_process_group()


def a_gpu_for_each_launched_rank() -> bool:
    """Whether this node has as many GPUs as a launcher started ranks on it."""
    return torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))


def world_size_for(command: str, ranks: int | None) -> int:
    """How many ranks ``command`` has: the launcher's, or those that it is to start, 2 by default.

    Raises:
        InputError: fewer than 2, or not as many as the launcher started.
    """
    launched = launched_world_size()
    if launched is not None and ranks not in (None, launched):
        raise InputError(f"asked for {ranks} ranks, but the launcher started {launched}: leave the number out")
    world_size = launched or (DEFAULT_RANKS if ranks is None else ranks)
    if world_size < 2:
        fix = "start it with torchrun --nproc-per-node 2" if launched else "ask for --ranks 2"
        raise InputError(f"{command} needs at least 2 ranks, got {world_size}: {fix}")
    return world_size


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
