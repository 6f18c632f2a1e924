"""The ranks of a command: those that a launcher started, or gloo processes that the command starts.

`ranks_for` is the one way in: what it yields calls a function on every rank, whoever started them.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist

from syncnorm.errors import InputError
from syncnorm.testing import run_ranks
from syncnorm.tools.common.launcher import launched_world_size
from syncnorm.tools.common.provenance import Hardware, hardware_of

DEFAULT_RANKS = 2

# Ranks that have no part in an arm wait for rank 0 to train it, however long the user lets that take.
WAIT = timedelta(days=1)

T = TypeVar("T")

# Takes a record of what has been found so far, in place of the one before, so that a later failure does not lose it.
Keep = Callable[[Any], None]


def discard(record: Any) -> None:
    """A `Keep` that keeps nothing."""


@dataclass(frozen=True)
class Ranks:
    """This process among the others, its device, and a gloo group for barriers and records.

    Barriers have their own group because a rank that waits in NCCL keeps its GPU busy, and because the default
    timeout of a group would end a long reference run.

    Attributes:
        keep: rank 0 calls it with a record of what it has found so far; see `ranks_for`.
    """

    rank: int
    world_size: int
    device: torch.device
    backend: str
    control: dist.ProcessGroup
    keep: Keep = discard

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


class OnRanks(Protocol):
    """What `ranks_for` yields."""

    def __call__(self, function: Callable[..., T], *args: Any, keep: Keep = discard) -> T:
        """Returns what ``function(ranks, *args)`` returned on rank 0, or here under a launcher.

        Args:
            function: called on every rank with its `Ranks`. Its name, ``args`` and the result are pickled where the
                ranks are started.
            args: for it.
            keep: called in this process with the record that rank 0 last passed to ``Ranks.keep``: at once under
                a launcher, else when a started rank has failed.

        Raises:
            RankError: a started rank failed.
        """


@contextmanager
def ranks_for(
    world_size: int, timeout: float, *, device: str = "cpu", cpu: bool = False, wait: timedelta = WAIT
) -> Iterator[OnRanks]:
    """The ranks of this command: a launcher's if there is one, else ``world_size`` gloo ranks on this machine.

    Args:
        world_size: of the ranks to start.
        timeout: seconds after which started ranks are taken for hung.
        device: ``"cpu"`` or ``"cuda"``, of the ranks to start; they share the GPUs.
        cpu: under a launcher, use gloo on the CPU even where there are GPUs.
        wait: how long ranks wait for each other.

    Collective: under a launcher, all ranks.
    """
    if launched_world_size() is None:

        def start(function: Callable[..., T], *args: Any, keep: Keep = discard) -> T:
            return _run_started(function, args, world_size, timeout, device, wait, keep)

        yield start
        return
    with launched_ranks(cpu, wait) as ranks:

        def call(function: Callable[..., T], *args: Any, keep: Keep = discard) -> T:
            return function(replace(ranks, keep=keep if ranks.rank == 0 else discard), *args)

        yield call


def _run_started(
    function: Callable[..., T],
    args: tuple[Any, ...],
    world_size: int,
    timeout: float,
    device: str,
    wait: timedelta,
    keep: Keep,
) -> T:
    with TemporaryDirectory(prefix="syncnorm-record-") as folder:
        write = _WriteRecord(Path(folder) / "record")
        try:
            results: list[T] = run_ranks(_started_rank, world_size, (function, args, device, wait, write), timeout)
            return results[0]
        except BaseException:  # Ctrl-C too
            if write.file.exists():
                keep(pickle.loads(write.file.read_bytes()))
            raise


def _started_rank(
    function: Callable[..., T], args: tuple[Any, ...], device: str, wait: timedelta, write: _WriteRecord
) -> T:
    # Accelerate would otherwise choose the number of threads by the hardware.
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
    place = torch.device("cpu")
    if device == "cuda":
        place = torch.device("cuda", dist.get_rank() % torch.cuda.device_count())
        torch.cuda.set_device(place)
    with initialized_ranks(place, wait) as ranks:
        return function(replace(ranks, keep=write if ranks.rank == 0 else discard), *args)


@dataclass(frozen=True)
class _WriteRecord:
    """The `Keep` of a started rank: writes ``file``, which is whole even if the rank is killed meanwhile."""

    file: Path

    def __call__(self, record: Any) -> None:
        part = self.file.with_suffix(".part")
        part.write_bytes(pickle.dumps(record))
        os.replace(part, self.file)


@contextmanager
def initialized_ranks(device: torch.device, wait: timedelta = WAIT) -> Iterator[Ranks]:
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
        with initialized_ranks(state.device if state.device.type == "cuda" else torch.device("cpu"), wait) as ranks:
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


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Sets the number of threads of torch's operators while the block runs: ranks on one machine share its cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
