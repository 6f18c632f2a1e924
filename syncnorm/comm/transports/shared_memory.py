"""Frames in memory that the ranks of one host share: each rank writes its own in place and reads those of the others.

The memory has a row for each rank of the group: the number of frames that the rank has sent, then a ring of slots for
the frames. A rank sends frame ``n`` by writing it into slot ``n % SLOTS`` and then counting it. It may do so once all
ranks have sent frame ``n - SLOTS + 1``, because each of them has then finished with frame ``n - SLOTS``.
"""

import ctypes
import time
from collections.abc import Sequence

from torch import Tensor

from syncnorm import native
from syncnorm.comm.frames import HEADER_BYTES, Frames, Header
from syncnorm.comm.transports.discovery import SharedFile
from syncnorm.comm.transports.gloo import GlooFrames, GlooTransport
from syncnorm.comm.transports.transfer import SLOTS, Swapped, Transfer

SLOT_BYTES = 2**16  # larger frames, of more than 8,000 channels in fp32, travel over gloo
_COUNT_BYTES = 128  # a number of its own pair of cache lines, which processors may fetch together
ROW_BYTES = _COUNT_BYTES + SLOTS * SLOT_BYTES
_CHECK_S = 0.02  # between two checks, by a rank that waits, whether another one has ended
_CHECK_NS = 20_000_000

_Fields = ctypes.c_int64 * len(Header._fields)


def bytes_for(world_size: int) -> int:
    """The size of the memory: the token by which ranks recognize it, then the rows."""
    return _COUNT_BYTES + world_size * ROW_BYTES


class Rows:
    """The rows of shared memory.

    Args:
        file: of :func:`bytes_for` bytes.
        world_size: the number of rows.
        own: the row of this rank.
        here: the rows of the ranks of this host.
        timeout_s: how long a rank may wait for another one.
    """

    def __init__(self, file: SharedFile, world_size: int, own: int, here: Sequence[int], timeout_s: float):
        assert native.library is not None, "ranks without it do not share memory"
        self.world_size, self.own, self.here, self._timeout_s = world_size, own, here, timeout_s
        self._file, self._bytes = file, memoryview(file.memory)
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(file.memory))
        self._offsets = [_COUNT_BYTES + row * ROW_BYTES for row in range(world_size)]
        self._all = self._counts(range(world_size))
        self._local = self._counts(here)
        self._publish, self._wait, self._swap = (getattr(native.library, n) for n in ("publish", "wait_for", "swap"))
        self._publish.argtypes, self._publish.restype = [ctypes.c_void_p, ctypes.c_int64], None
        self._wait.argtypes, self._wait.restype = [ctypes.c_void_p] * 2 + [ctypes.c_int64] * 4, ctypes.c_int64
        self._swap.argtypes = [ctypes.c_void_p] * 2 + [ctypes.c_int64] * 5 + [ctypes.c_void_p] * 3
        self._swap.restype = ctypes.c_int
        self._values = (ctypes.c_int64 * world_size)()

    def frame(self, row: int, number: int, capacity: int) -> memoryview:
        """The memory of a rank's frame."""
        start = self._offsets[row] + _COUNT_BYTES + number % SLOTS * SLOT_BYTES
        return self._bytes[start : start + capacity]

    def frames(self, number: int, capacity: int) -> Frames:
        """The frames with that number."""
        received = self._bytes[self._offsets[0] + _COUNT_BYTES + number % SLOTS * SLOT_BYTES :]
        return Frames(self.frame(self.own, number, capacity), received, ROW_BYTES, self.world_size)

    def publish(self, row: int, number: int) -> None:
        """Counts the frame of ``row`` as sent."""
        self._publish(self._base + self._offsets[row], number)

    def swap(self, number: int, header: Header, vector: Tensor) -> list[int] | None:
        """Writes this rank's frame, publishes it and waits a moment for the others.

        Returns:
            The last field of each rank's header, if all frames are there and belong to the same call; else None.
        """
        slot = _COUNT_BYTES + number % SLOTS * SLOT_BYTES
        complete = self._swap(
            self._base, self._all, self.world_size, self.own, slot, number, _CHECK_NS, _Fields(*header),
            vector.data_ptr(), self._values,
        )  # fmt: skip
        return self._values[:] if complete else None

    def arrived(self, number: int, waiting_since: float, seconds: float, local: bool = False) -> bool:
        """Waits for the frames with that number, at most ``seconds``; whether they are all there.

        Args:
            number: of the frames.
            waiting_since: when the wait for them began, by time.monotonic.
            seconds: how long to wait now.
            local: only for those of the ranks of this host.

        Raises:
            RuntimeError: a rank has ended, or the timeout is over.
        """
        offsets, rows = (self._local, self.here) if local else (self._all, range(self.world_size))
        began = now = time.monotonic()
        while True:
            waited_ns, max_ns = int((now - waiting_since) * 1e9), int(min(seconds, _CHECK_S) * 1e9)
            missing = self._wait(self._base, offsets, len(rows), number, waited_ns, max_ns)
            if missing == len(rows):
                return True
            self._check(number, rows, now - waiting_since)
            now = time.monotonic()
            if now - began >= seconds:
                return False

    def _check(self, number: int, rows: Sequence[int], waited_s: float) -> None:
        # First the locks and then the numbers: a rank may have sent its frame and ended since.
        ended = [row for row in self.here if row != self.own and self._file.has_ended(row)]
        if ended or waited_s > self._timeout_s:
            missing = [row for row in rows if self._wait(self._base, self._counts([row]), 1, number, 0, 0) == 0]
            if self.here[0] in ended and not set(missing).issubset(self.here):  # it would have brought their frames
                missing.append(self.here[0])
            if dead := [row for row in ended if row in missing]:
                raise RuntimeError(f"the process of rank {dead[0]} of the group has ended")
            if missing and waited_s > self._timeout_s:
                raise RuntimeError(f"no frame from ranks {missing} of the group within {waited_s:.0f} s")

    def _counts(self, rows: Sequence[int]) -> "ctypes.Array[ctypes.c_int64]":
        return (ctypes.c_int64 * len(rows))(*(self._offsets[row] for row in rows))


class SharedMemoryTransfer:
    """A frame of this rank in shared memory, and the wait for the same frame of the others."""

    def __init__(self, rows: Rows, number: int):
        self.rows, self.number = rows, number
        self.since = time.monotonic()

    def arrived(self, seconds: float) -> bool:
        """As ``Transfer.arrived``."""
        return self.rows.arrived(self.number, self.since, seconds)

    def delivered(self) -> bool:
        """As ``Transfer.delivered``: the memory lives as long as one rank has it."""
        return True

    def leave(self) -> None:
        """Does nothing: the frame is where the other ranks look for it."""


class SharedMemoryTransport:
    """Frames between ranks of one host.

    Args:
        rows: of the ranks.
        flat: for frames that are too large for a slot.
    """

    def __init__(self, rows: Rows, flat: GlooTransport):
        self.description = f"shared memory, {rows.world_size} ranks of one host"
        self._rows, self._flat = rows, flat
        self._sent = 0
        self._frames = [rows.frames(slot, SLOT_BYTES) for slot in range(SLOTS)]

    def frames(self, capacity: int) -> Frames:
        """As ``Transport.frames``."""
        if capacity > SLOT_BYTES:
            return self._flat.frames(capacity)
        return self._frames[(self._sent + 1) % SLOTS]

    def swap(self, capacity: int, header: Header, vector: Tensor) -> Swapped | None:
        """As ``Transport.swap``."""
        if max(capacity, header.size + HEADER_BYTES) > SLOT_BYTES or not (vector.is_cpu and vector.is_contiguous()):
            return None
        self._sent += 1
        values = self._rows.swap(self._sent, header, vector)
        return Swapped(self._frames[self._sent % SLOTS], SharedMemoryTransfer(self._rows, self._sent), values)

    def send(self, frames: Frames) -> Transfer:
        """As ``Transport.send``."""
        if isinstance(frames, GlooFrames):
            return self._flat.send(frames)
        self._sent += 1
        self._rows.publish(self._rows.own, self._sent)
        return SharedMemoryTransfer(self._rows, self._sent)
