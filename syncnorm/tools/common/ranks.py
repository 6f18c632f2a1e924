"""The ranks of a command: those of a launcher, or gloo processes that the command itself starts.

Commands use `ranks_for`, which yields a callable that runs a function on every rank in either case.
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

from syncnorm._torch_versions import destroy_process_group
from syncnorm.errors import InputError
from syncnorm.testing import run_ranks
from syncnorm.tools.common.launcher import launched_world_size
from syncnorm.tools.common.provenance import Hardware, hardware_of

DEFAULT_RANKS = 2

# Ranks that do not take part in an arm wait while rank 0 trains it, however many steps the user asks for.
WAIT = timedelta(days=1)

T = TypeVar("T")

# Called with the results so far, which replace those of the call before, so that a later failure does not lose them.
Keep = Callable[[Any], None]


def discard(record: Any) -> None:
    """A `Keep` that does nothing."""


@dataclass(frozen=True)
class Ranks:
    """This process's rank, the world size, its device, and a gloo group for barriers and records.

    Barriers have their own group because a rank that waits in NCCL keeps its GPU busy, and because the default
    timeout of a group would end a long run on rank 0.

    Attributes:
        backend: of the default process group.
        control: the gloo group.
        keep: rank 0 calls it with a record of the results so far; see `OnRanks`.
    """

    rank: int
    world_size: int
    device: torch.device
    backend: str
    control: dist.ProcessGroup
    keep: Keep = discard

    def wait(self) -> None:
        """Blocks until every rank has called it. Collective: all ranks, one barrier."""
        dist.barrier(group=self.control)

    def share(self, record: T | None) -> T:
        """Returns rank 0's record on every rank. Collective: all ranks, one object broadcast."""
        box = [record]
        dist.broadcast_object_list(box, src=0, group=self.control)
        assert box[0] is not None
        return box[0]

    def collect(self, record: T) -> list[T]:
        """Returns the records of all ranks on every rank. Collective: all ranks, one object gather."""
        box: list[T | None] = [None] * self.world_size
        dist.all_gather_object(box, record, group=self.control)
        return [each for each in box if each is not None]

    def hardware(self) -> Hardware:
        """The hardware that this rank runs on."""
        return hardware_of(self.device, self.backend)


class OnRanks(Protocol):
    """What `ranks_for` yields."""

    def __call__(self, function: Callable[..., T], *args: Any, keep: Keep = discard) -> T:
        """Calls ``function(ranks, *args)`` on every rank; returns rank 0's result, or this rank's under a launcher.

        Args:
            function: called with the `Ranks` of each rank. If the command starts the ranks, the name of the
                function, ``args`` and the result are pickled.
            args: further arguments of ``function``.
            keep: called in this process with what rank 0 passes to ``Ranks.keep``: at once under a launcher;
                otherwise only if a started rank fails, with the last record.

        Raises:
            RankError: a started rank failed.
        """


@contextmanager
def ranks_for(
    world_size: int, timeout: float, *, device: str = "cpu", cpu: bool = False, wait: timedelta = WAIT
) -> Iterator[OnRanks]:
    """The ranks of this command: the launcher's if there is one, otherwise ``world_size`` gloo ranks on this machine.

    Args:
        world_size: number of ranks to start.
        timeout: seconds after which started ranks are ended as hung.
        device: ``"cpu"`` or ``"cuda"``, for the ranks to start; they share the GPUs.
        cpu: under a launcher, use gloo on the CPU even if there are GPUs.
        wait: timeout of the group in which ranks wait for each other.

    Collective: under a launcher, all ranks.
    """
    if launched_world_size() is None:

        def start(function: Callable[..., T], *args: Any, keep: Keep = discard) -> T:
            with TemporaryDirectory(prefix="syncnorm-record-") as folder:
                write = _WriteRecord(Path(folder) / "record")
                arguments = (function, args, device, wait, write)
                try:
                    results: list[T] = run_ranks(_started_rank, world_size, arguments, timeout)
                    return results[0]
                except BaseException:  # KeyboardInterrupt too
                    if write.file.exists():
                        keep(pickle.loads(write.file.read_bytes()))
                    raise

        yield start
        return
    with launched_ranks(cpu, wait) as ranks:

        def call(function: Callable[..., T], *args: Any, keep: Keep = discard) -> T:
            return function(replace(ranks, keep=keep if ranks.rank == 0 else discard), *args)

        yield call


def _started_rank(
    function: Callable[..., T], args: tuple[Any, ...], device: str, wait: timedelta, write: _WriteRecord
) -> T:
    # Otherwise accelerate chooses the number of threads from the number of cores.
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
    place = torch.device("cpu")
    if device == "cuda":
        place = torch.device("cuda", dist.get_rank() % torch.cuda.device_count())
        torch.cuda.set_device(place)
    with initialized_ranks(place, wait) as ranks:
        return function(replace(ranks, keep=write if ranks.rank == 0 else discard), *args)


@dataclass(frozen=True)
class _WriteRecord:
    """The `Keep` of a started rank: replaces ``file``, which stays complete even if the rank is killed meanwhile."""

    file: Path

    def __call__(self, record: Any) -> None:
        part = self.file.with_suffix(".part")
        part.write_bytes(pickle.dumps(record))
        os.replace(part, self.file)


@contextmanager
def initialized_ranks(device: torch.device, wait: timedelta = WAIT) -> Iterator[Ranks]:
    """The `Ranks` of the process group that is already initialized; ``wait`` is the timeout of ``control``.

    Collective: all ranks, one ``new_group``.
    """
    control = dist.new_group(backend="gloo", timeout=wait)
    assert isinstance(control, dist.ProcessGroup)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), device, dist.get_backend(), control)
    finally:
        destroy_process_group(control)


@contextmanager
def launched_ranks(cpu: bool = False, wait: timedelta = WAIT) -> Iterator[Ranks]:
    """The `Ranks` that a launcher started, with the device and the backend that accelerate chooses for them.

    These are gloo and the CPU if ``cpu``, or if the node has fewer GPUs than ranks: NCCL does not allow two ranks on
    one GPU.

    Collective: all ranks.
    """
    from accelerate import PartialState

    ours = not dist.is_initialized()
    state = PartialState(cpu=cpu or not a_gpu_for_each_launched_rank())
    try:
        # accelerate gives the CPU an index ("cpu:0"), which DDP takes for a device that the module must be on.
        with initialized_ranks(state.device if state.device.type == "cuda" else torch.device("cpu"), wait) as ranks:
            yield ranks
    finally:
        if ours:
            state.destroy_process_group()


def a_gpu_for_each_launched_rank() -> bool:
    """Whether this node has at least as many GPUs as ranks that the launcher started on it."""
    return torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))


def world_size_for(command: str, ranks: int | None, least: int = 2) -> int:
    """The number of ranks of ``command``: those of the launcher, or those to start, 2 by default.

    Raises:
        InputError: the number is less than ``least``, or is not that of the launcher.
    """
    launched = launched_world_size()
    if launched is not None and ranks not in (None, launched):
        raise InputError(f"asked for {ranks} ranks, but the launcher started {launched}: leave the number out")
    world_size = launched or (DEFAULT_RANKS if ranks is None else ranks)
    if world_size < least:
        fix = "start it with torchrun --nproc-per-node 2" if launched else "ask for --ranks 2"
        raise InputError(f"{command} needs at least {least} rank{'s' * (least > 1)}, got {world_size}: {fix}")
    return world_size


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Limits the threads of torch's operators while the block runs: ranks on one machine share its cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
