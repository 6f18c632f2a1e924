"""A rank by itself in this process: in a made-up world, or in a real one that has nobody else.

One card can so show what a synced step costs without wires. Torch's ``fake`` group returns from its collectives at
once and leaves each rank's row filled with this rank's own, so the layer merges as many rows as the world has ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
import torch.distributed as dist

from syncnorm.comm import process_groups
from syncnorm.errors import InputError
from syncnorm.tools.bench.records import Benchmark, Settings
from syncnorm.tools.bench.session import measure_on_rank
from syncnorm.tools.common.launcher import launched_world_size
from syncnorm.tools.common.progress import ProgressFactory
from syncnorm.tools.common.ranks import WAIT, Keep, Ranks, discard, torch_threads, world_size_for

BACKENDS = ("gloo", "nccl", "fake")
FAKE_WORLD = 8  # of a usual node


def check_backend(backend: str | None, ranks: int | None, device: str) -> int:
    """How many ranks the world of ``backend`` has; None is gloo, or the launcher's.

    Raises:
        InputError: there is no such backend, or no such world of it.
    """
    if backend not in (None, *BACKENDS):
        raise InputError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend is not None and launched_world_size() is not None:
        raise InputError(f"asked for {backend}, but a launcher's ranks have their backend: leave --backend out")
    if backend in (None, "gloo"):
        return world_size_for("bench", ranks)
    if dist.is_initialized():
        raise InputError(f"{backend} needs a process group of its own, and this process has one: destroy it first")
    if backend == "fake":
        world_size = FAKE_WORLD if ranks is None else ranks
        if world_size < 1:
            raise InputError(f"ranks must be at least 1, got {world_size}")
        return world_size
    if device != "cuda":
        raise InputError(f"nccl needs cuda, got {device}: take --backend fake or gloo")
    if ranks not in (None, 1):
        raise InputError(
            f"nccl is for one rank in this process, got {ranks}: for more of them, on a GPU each, "
            f"torchrun --nproc-per-node {ranks} -m syncnorm bench"
        )
    return 1


def run_alone(settings: Settings, command: str, progress: ProgressFactory, keep: Keep = discard) -> Benchmark:
    """Measures what ``settings`` say in this process, which must have no process group."""
    on_gpu = settings.device == "cuda"
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    fake = settings.backend == "fake"
    world = fake_world(settings.world_size, device) if fake else world_of_one("nccl", device)
    syncing = process_groups.sync_in_world_of_one() if settings.world_size == 1 else nullcontext()
    with torch_threads(torch.get_num_threads() if on_gpu else 1), world as ranks, syncing:
        return measure_on_rank(replace(ranks, keep=keep), settings, command, progress)


@contextmanager
def fake_world(world_size: int, device: torch.device) -> Iterator[Ranks]:
    """Rank 0 of ``world_size``, of which there are no others."""
    # Imported here: it registers a backend.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        assert dist.group.WORLD is not None
        yield Ranks(0, world_size, device, "fake", dist.group.WORLD)
    finally:
        dist.destroy_process_group()


@contextmanager
def world_of_one(backend: str, device: torch.device) -> Iterator[Ranks]:
    """The only rank of a real group of ``backend``."""
    store = dist.HashStore()  # type: ignore[attr-defined]  # torch exports it untyped
    dist.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        control = dist.new_group(backend="gloo", timeout=WAIT)
        assert isinstance(control, dist.ProcessGroup)
        yield Ranks(0, 1, device, backend, control)
    finally:
        dist.destroy_process_group()
