"""Which ranks of a group share memory: found out, because host names and launchers' variables may be wrong.

Each rank makes an anonymous file with a random token in it and tells the others where it is. A rank belongs to the
host of the first rank whose file it can open and whose token it finds there. Containers with process namespaces of
their own, for example, do not see one another's files, although their ranks may have the same host name.
"""

import mmap
import os
import secrets
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

import torch
import torch.distributed as dist

if sys.platform != "win32":  # where there is no native code either, which shared memory needs
    import fcntl

TOKEN_BYTES = 32  # at the start of the file
_NOTE_BYTES = 512  # of what a rank tells the others
_LONGEST_PATH = 300


class SharedFile:
    """A file that ranks of one host have mapped; it has no name in a file system.

    A rank holds a lock of the byte of its row. The system releases it as soon as the process has ended, however that
    came about, and keeps it while the process is only stopped. Neither process identifiers nor a reaped parent are
    needed for that, and children that inherit the file do not inherit the lock.

    Args:
        descriptor: of the file; closed when this object is freed.
        size: bytes to map.
    """

    def __init__(self, descriptor: int, size: int):
        self._descriptor = descriptor
        self.memory = mmap.mmap(descriptor, size)

    def __del__(self) -> None:
        os.close(self._descriptor)

    def hold(self, row: int) -> None:
        """Takes the lock of this rank."""
        fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, row)

    def has_ended(self, row: int) -> bool:
        """Whether the process that held the lock of ``row`` has ended."""
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, row)
        except OSError:
            return False
        fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1, row)
        return True


class Hosts(NamedTuple):
    """The result of :func:`find_hosts`."""

    rows: list[list[int]]  # the ranks of the group on each host, in order of their first ones; the same on all ranks
    memory: SharedFile | None  # that this host's ranks share; None on all ranks if ranks do not share memory
    reason: str  # why they do not


def find_hosts(connections: dist.ProcessGroup, rank: int, world_size: int, size: int, unable: str = "") -> Hosts:
    """Finds the ranks that share memory, and makes them share a file.

    Args:
        connections: a group of the ranks.
        rank: of this process in the group.
        world_size: the number of ranks.
        size: bytes of the file.
        unable: why this rank cannot use shared memory; empty if it can.

    Collective: all ranks of ``connections``; two gathers.
    """
    token = secrets.token_hex(TOKEN_BYTES // 2)
    own, path, error = -1, "", f"rank {rank}: {unable}" if unable else ""
    if not unable:
        try:
            own, path = create_file(token)
            if len(path.encode()) > _LONGEST_PATH:
                raise OSError(f"its path is longer than {_LONGEST_PATH} bytes: {path}")
            os.write(own, token.encode())
            os.ftruncate(own, size)
        except OSError as failure:
            error = f"rank {rank} could not make a file: {failure}"
    notes = [
        note.split("\n")
        for note in _gather_notes(connections, f"{token}\n{'' if error else path}\n{error}", world_size)
    ]
    errors = [note[2] for note in notes if note[2]]
    leader, descriptor, memory, error = rank, -1, None, ""
    if not errors:
        leader, descriptor = _first_visible(notes, rank, own)
        try:
            memory = _share(descriptor, size, rank, leader)
        except OSError as failure:
            error = f"rank {rank} could not share {size} bytes: {failure}"
    answers = [note.split("\n") for note in _gather_notes(connections, f"{leader}\n{error}", world_size)]
    if own not in (-1, descriptor):
        os.close(own)
    if path and not path.startswith("/proc"):
        with suppress(OSError):
            os.unlink(path)  # all ranks have it open, or never will
    leaders = [int(answer[0]) for answer in answers]
    errors += [answer[1] for answer in answers if answer[1]]
    rows = [[row for row in range(world_size) if leaders[row] == first] for first in sorted(set(leaders))]
    if not errors and any(leaders[first] != first for first in leaders):
        errors.append("ranks see one another's files in one direction only")
    if not errors and len(rows) == world_size > 1:
        errors.append("each rank sees its own files only, as on different hosts")
    return Hosts(rows, None if errors else memory, errors[0] if errors else "")


def create_file(token: str = "") -> tuple[int, str]:
    """A new file: its descriptor, and a path by which other processes of this host can open it.

    Args:
        token: part of its name, where it has one.

    Raises:
        OSError: there is no place for one.
    """
    with suppress(AttributeError, OSError):  # not Linux, or forbidden
        # Without a name in a file system: whenever a process is killed, nothing is left, and the size of /dev/shm,
        # which containers limit to 64 MB, does not matter.
        descriptor = os.memfd_create(f"syncnorm-{token}")  # closed by exec
        return descriptor, f"/proc/{os.getpid()}/fd/{descriptor}"
    with suppress(OSError):  # absent, as on macOS, or not writable
        return tempfile.mkstemp(prefix="syncnorm-", dir="/dev/shm")
    return tempfile.mkstemp(prefix="syncnorm-")


def _first_visible(notes: Sequence[Sequence[str]], rank: int, own: int) -> tuple[int, int]:
    """The first rank whose file this process can open, and the descriptor of that file."""
    for row, (token, path, _) in enumerate(notes[:rank]):
        descriptor = -1
        with suppress(OSError):
            # Another process may have that number in this namespace, and its file may be anything: even one that we
            # share with others, whose locks closing a second descriptor would release.
            if path.startswith("/proc") and not os.readlink(path).startswith(f"/memfd:syncnorm-{token}"):
                continue
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            if os.read(descriptor, TOKEN_BYTES) == token.encode():
                return row, descriptor
        if descriptor >= 0:
            os.close(descriptor)
    return rank, own


def _share(descriptor: int, size: int, rank: int, leader: int) -> SharedFile:
    memory = SharedFile(descriptor, size)
    if rank == leader and hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)  # a full file system would end the process at its first access
    memory.hold(rank)
    return memory


def _gather_notes(connections: dist.ProcessGroup, note: str, world_size: int) -> list[str]:
    encoded = note.encode()[: _NOTE_BYTES - 1]
    rows = [torch.zeros(_NOTE_BYTES, dtype=torch.uint8) for _ in range(world_size)]
    row = torch.frombuffer(bytearray(encoded.ljust(_NOTE_BYTES, b"\0")), dtype=torch.uint8)
    connections.allgather([rows], [row]).wait()
    return [bytes(row.tolist()).rstrip(b"\0").decode(errors="replace") for row in rows]
