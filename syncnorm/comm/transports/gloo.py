"""Frames over gloo connections: each rank sends its frame to each other rank."""

import functools
import os
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from syncnorm._torch_versions import Work
from syncnorm.comm.frames import Frames, Header, outside_of_modes
from syncnorm.comm.transports.transfer import SLOTS

# How long a waiting rank spins. A sleeping thread is woken late, on a core that has gone cold; one that yields leaves
# the core to gloo's own threads and to other processes.
_SPIN_S = 0.005

_yield = getattr(os, "sched_yield", functools.partial(time.sleep, 0))


class GlooTransfer:
    """A collective of gloo, and the buffers that must live until it is complete."""

    def __init__(self, work: Work, *buffers: Tensor):
        self._work, self._buffers = work, buffers

    def arrived(self, seconds: float) -> bool:
        """As ``Transfer.arrived``; gloo knows the timeout of the group."""
        work = self._work
        deadline = time.monotonic() + min(_SPIN_S, seconds)
        while not work.is_completed() and time.monotonic() < deadline:
            _yield()
        try:
            work.wait(timedelta(seconds=max(seconds, 0.001)))
        except RuntimeError:
            if not work.is_completed():  # it was only the time that ran out
                return False
            work.wait()  # raises if it failed, and returns if it completed just now
        return True

    def delivered(self) -> bool:
        """As ``Transfer.delivered``: gloo sends the frame only when the other rank asks for it."""
        return self._work.is_completed()

    def leave(self) -> None:
        """Does nothing: gloo's own threads send the frame."""


class GlooFrames(Frames):
    """Frames in buffers of this process: gloo sends a copy of this rank's frame to every rank."""

    def __init__(self, capacity: int, world_size: int):
        sent, received = bytearray(world_size * capacity), bytearray(world_size * capacity)
        super().__init__(memoryview(sent)[:capacity], memoryview(received), capacity, world_size)
        with outside_of_modes():
            self.sent = torch.frombuffer(sent, dtype=torch.uint8)
            self.received = torch.frombuffer(received, dtype=torch.uint8)


class GlooTransport:
    """Frames of any size between any ranks.

    Args:
        connections: a gloo group of these ranks that nothing else uses.
        world_size: the number of ranks.
    """

    def __init__(self, connections: dist.ProcessGroup, world_size: int):
        self.description = f"gloo, {world_size} ranks"
        self._connections = connections
        self._world_size = world_size
        self._sent = 0
        self._buffers: dict[tuple[int, int], GlooFrames] = {}  # by capacity and place in a ring

    def frames(self, capacity: int) -> GlooFrames:
        """As ``Transport.frames``."""
        key = capacity, self._sent % SLOTS
        if key not in self._buffers:
            self._buffers[key] = GlooFrames(capacity, self._world_size)
        return self._buffers[key]

    def send(self, frames: Frames) -> GlooTransfer:
        """As ``Transport.send``."""
        assert isinstance(frames, GlooFrames)
        self._sent += 1
        # A frame for each rank. gloo's all_gather needs only one, but passes frames around a ring: that is slower.
        frames.sent.view(self._world_size, -1)[1:] = frames.sent[: frames.capacity]
        work = self._connections.alltoall_base(frames.received, frames.sent, [], [])
        return GlooTransfer(work, frames.sent, frames.received)

    def swap(self, capacity: int, header: Header, vector: Tensor) -> None:
        """As ``Transport.swap``."""
