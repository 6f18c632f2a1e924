"""The ranks of a comparison: those that a launcher started, or gloo processes of our own."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from syncnorm.compare.records import Comparison, Hardware

# Ranks that have no part in an arm wait for rank 0 to train it, however long the user lets that take.
WAIT = timedelta(days=1)


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

    def share(self, comparison: Comparison | None) -> Comparison:
        """Rank 0's record, on every rank. Collective: all ranks, one object broadcast."""
        box = [comparison]
        dist.broadcast_object_list(box, src=0, group=self.control)
        assert box[0] is not None
        return box[0]

    def hardware(self) -> Hardware:
        """What this rank runs on."""
        on_gpu = self.device.type == "cuda"
        return Hardware(
            device=self.device.type,
            device_name=torch.cuda.get_device_name(self.device) if on_gpu else _cpu_name(),
            backend=self.backend,
            cpu_count=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
            threads_per_rank=torch.get_num_threads(),
        )


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
def launched_ranks() -> Iterator[Ranks]:
    """`Ranks` of a launcher's environment, on the devices and the backend that accelerate picks for them.

    Gloo on the CPU where the node has fewer GPUs than ranks: NCCL refuses two ranks on one GPU.
    Collective: all ranks.
    """
    from accelerate import PartialState

    ours = not dist.is_initialized()
    too_few_gpus = torch.cuda.device_count() < int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    state = PartialState(cpu=too_few_gpus)
    try:
        # accelerate numbers CPUs ("cpu:0"), which DDP takes for a device to pin the module to.
        with initialised_ranks(state.device if state.device.type == "cuda" else torch.device("cpu")) as ranks:
            yield ranks
    finally:
        if ours:
            state.destroy_process_group()


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
