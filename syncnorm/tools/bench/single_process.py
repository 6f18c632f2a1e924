"""Worlds of a single process: rank 0 of a fake world, or the only rank of a real one.

With them, one GPU shows what a synchronized step costs without wires. The collectives of torch's ``fake`` group
return at once and fill the row of each rank with this rank's own, so that the layer merges as many rows as the world
has ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist

from syncnorm.comm import process_groups
from syncnorm.errors import InputError
from syncnorm.tools.common.ranks import WAIT, Ranks

DEFAULT_FAKE_RANKS = 8  # GPUs of a usual node
_GATHERS = ("all_gather_single", "all_gather_into_tensor")


def check_single_process(backend: str, ranks: int | None, device: str) -> int:
    """The number of ranks of the world of ``backend``, which is ``"fake"`` or ``"nccl"``.

    Raises:
        InputError: there is no such world.
    """
    if dist.is_initialized():
        raise InputError(f"{backend} needs a process group of its own, and this process has one: destroy it first")
    if backend == "fake":
        world_size = DEFAULT_FAKE_RANKS if ranks is None else ranks
        if world_size < 1:
            raise InputError(f"ranks must be at least 1, got {world_size}")
        return world_size
    if device != "cuda":
        raise InputError(f"nccl needs cuda, got {device}: use --backend fake or gloo")
    if ranks not in (None, 1):
        raise InputError(
            f"nccl runs as a single rank in this process, got {ranks} ranks: for several, with a GPU each, use "
            f"torchrun --nproc-per-node {ranks} -m syncnorm bench"
        )
    return 1


@contextmanager
def single_process_world(backend: str, world_size: int, device_type: str) -> Iterator[Ranks]:
    """The world that `check_single_process` accepted; syncnorm's layers synchronize even if it has one rank."""
    on_gpu = device_type == "cuda"
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    world = fake_world(world_size, device) if backend == "fake" else world_of_one(backend, device)
    syncing = process_groups.sync_in_world_of_one() if world_size == 1 else nullcontext()
    with world as ranks, syncing:
        yield ranks


@contextmanager
def fake_world(world_size: int, device: torch.device) -> Iterator[Ranks]:
    """Rank 0 of ``world_size``; the others do not exist."""
    # Imported here because the import registers a backend.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        assert dist.group.WORLD is not None
        with _gathers_into_any_shape():
            yield Ranks(0, world_size, device, "fake", dist.group.WORLD)
    finally:
        dist.destroy_process_group()


@contextmanager
def _gathers_into_any_shape() -> Iterator[None]:
    """Lets the fake group gather into an output of any shape, as NCCL does; ``torch.nn.SyncBatchNorm`` uses (1, W n).

    The group itself divides the first dimension among the ranks.
    """

    def flattening(gather: Callable[..., Any]) -> Callable[..., Any]:
        return lambda output_tensor, *args, **kwargs: gather(output_tensor.view(-1), *args, **kwargs)

    # torch 2.11 has only the second name.
    originals = {name: getattr(dist, name) for name in _GATHERS if hasattr(dist, name)}
    try:
        for name, gather in originals.items():
            setattr(dist, name, flattening(gather))
        yield
    finally:
        for name, gather in originals.items():
            setattr(dist, name, gather)


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
