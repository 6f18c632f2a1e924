"""Frames between several hosts: the first rank of each host sends the frames of its host to the others.

The memory of a host has a row for every rank of the group. Its own ranks write theirs; the first rank, the leader,
receives the rows of the other hosts over gloo and writes them. So each frame crosses a link between two hosts once,
and every rank reads the frames in rank order, whichever host they come from.
"""

import threading
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from syncnorm.comm.failure_flags import start_thread
from syncnorm.comm.frames import Frames, Header
from syncnorm.comm.transports.gloo import GlooFrames, GlooTransfer, GlooTransport
from syncnorm.comm.transports.shared_memory import SLOT_BYTES, Rows, SharedMemoryTransfer
from syncnorm.comm.transports.transfer import SLOTS, Transfer


class Leaders:
    """The gloo connections between the leaders of the hosts.

    Args:
        connections: a gloo group of the leaders, in the order of ``hosts``.
        hosts: the rows of each host.
        here: the place of this rank's host in ``hosts``.
    """

    def __init__(self, connections: dist.ProcessGroup, hosts: Sequence[Sequence[int]], here: int):
        self.hosts, self.here, self._connections = hosts, here, connections

    def start(self, rows: Rows, number: int, capacity: int) -> tuple[GlooTransfer, memoryview]:
        """Sends the frames of this host to the other hosts.

        Returns:
            The transfer, and the memory for what it receives: one block for each host, all as large as the largest.
        """
        block = max(map(len, self.hosts)) * capacity
        sent, received = (bytearray(len(self.hosts) * block) for _ in range(2))
        frames = b"".join(rows.frame(row, number, capacity) for row in self.hosts[self.here])
        for start in range(0, len(sent), block):
            sent[start : start + len(frames)] = frames
        into, out = (torch.frombuffer(buffer, dtype=torch.uint8) for buffer in (received, sent))
        work = self._connections.alltoall_base(into, out, [], [])
        return GlooTransfer(work, into, out), memoryview(received)

    def finish(self, rows: Rows, number: int, capacity: int, received: memoryview) -> None:
        """Writes the frames of the other hosts into their rows."""
        block = len(received) // len(self.hosts)
        for host, host_rows in enumerate(self.hosts):
            if host == self.here:
                continue
            for place, row in enumerate(host_rows):
                start = host * block + place * capacity
                rows.frame(row, number, capacity)[:] = received[start : start + capacity]
                rows.publish(row, number)


class LeaderTransfer(SharedMemoryTransfer):
    """A transfer of a leader: it completes once the frames of this host are there and those of the others came.

    Args:
        rows: of this host.
        number: of the frames.
        capacity: of a frame.
        leaders: the connections to the other hosts.
        earlier: the transfer before this one: all leaders must start theirs in the same order.
    """

    def __init__(self, rows: Rows, number: int, capacity: int, leaders: Leaders, earlier: "LeaderTransfer | None"):
        super().__init__(rows, number)
        self._leaders, self._capacity, self._earlier = leaders, capacity, earlier
        self._between: tuple[GlooTransfer, memoryview] | None = None
        self._complete = False
        self._lock = threading.Lock()

    def arrived(self, seconds: float) -> bool:
        """As ``Transfer.arrived``."""
        with self._lock:
            if self._complete:
                return True
            if self._earlier is not None:
                if not self._earlier.arrived(seconds):
                    return False
                self._earlier = None
            if self._between is None:
                if not self.rows.arrived(self.number, self.since, seconds, local=True):
                    return False
                self._between = self._leaders.start(self.rows, self.number, self._capacity)
            transfer, received = self._between
            if transfer.arrived(seconds):
                self._leaders.finish(self.rows, self.number, self._capacity, received)
                self._complete = True
            return self._complete

    def delivered(self) -> bool:
        """As ``Transfer.delivered``: other ranks depend on this one."""
        return self._complete

    def leave(self) -> None:
        """Goes on in a thread: other ranks, whose frames pass through this one, may come late."""
        if not self._complete:
            start_thread(self._finish)

    def _finish(self) -> None:
        try:
            while not self.arrived(0.1):
                pass
        except RuntimeError:
            pass  # the ranks that wait find out for themselves


class TwoLevelTransport:
    """Frames between ranks of several hosts.

    Args:
        rows: of this host.
        flat: for frames that are too large for a slot.
        hosts: the rows of each host.
        leaders: on the first rank of each host.
    """

    def __init__(self, rows: Rows, flat: GlooTransport, hosts: Sequence[Sequence[int]], leaders: Leaders | None):
        sizes = " + ".join(str(len(host)) for host in hosts)
        self.description = f"shared memory on {len(hosts)} hosts ({sizes} ranks), gloo between them"
        self._rows, self._flat, self._leaders = rows, flat, leaders
        self._sent = 0
        self._last: LeaderTransfer | None = None
        self._frames: dict[tuple[int, int], Frames] = {}  # by capacity and slot

    def frames(self, capacity: int) -> Frames:
        """As ``Transport.frames``."""
        if capacity > SLOT_BYTES:
            return self._flat.frames(capacity)
        key = capacity, (self._sent + 1) % SLOTS
        if key not in self._frames:
            self._frames[key] = self._rows.frames(key[1], capacity)
        return self._frames[key]

    def send(self, frames: Frames) -> Transfer:
        """As ``Transport.send``."""
        if isinstance(frames, GlooFrames):
            return self._flat.send(frames)
        self._sent += 1
        self._rows.publish(self._rows.own, self._sent)
        if self._leaders is None:
            return SharedMemoryTransfer(self._rows, self._sent)
        self._last = LeaderTransfer(self._rows, self._sent, frames.capacity, self._leaders, self._last)
        return self._last

    def swap(self, capacity: int, header: Header, vector: Tensor) -> None:
        """As ``Transport.swap``."""
