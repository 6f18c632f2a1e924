"""How frames travel between the ranks of a group: through shared memory, over gloo, or both.

Ranks of one host read each other's frames in memory that they share (``shared_memory``); which ranks are on one host
is found out (``discovery``). If there are several hosts, one rank of each sends the frames of its host to the others
(``two_level``). Otherwise every rank sends its frame to every other over gloo (``gloo``).
"""

import os
from collections.abc import Callable
from typing import Literal, TypeAlias, get_args

import torch.distributed as dist

from syncnorm import native
from syncnorm._torch_versions import PrefixStore, Store
from syncnorm.comm.transports.discovery import find_hosts
from syncnorm.comm.transports.gloo import GlooTransport
from syncnorm.comm.transports.shared_memory import Rows, SharedMemoryTransport, bytes_for
from syncnorm.comm.transports.transfer import SLOTS, Transfer, Transport
from syncnorm.comm.transports.two_level import Leaders, TwoLevelTransport
from syncnorm.errors import InputError, SyncNormError

__all__ = ["SLOTS", "Transfer", "Transport", "TransportName", "checked_transport", "connect", "default_transport"]

# "native" exchanges no frames: the layer then calls the collectives of the user's process group.
TransportName: TypeAlias = Literal["auto", "shm", "gloo", "native"]

Connect: TypeAlias = Callable[[Store, int, int], dist.ProcessGroup]  # of a store, a rank and the number of ranks


def default_transport() -> str:
    """The value of ``SYNCNORM_TRANSPORT``, "auto" if it is not set; not checked before the ranks have compared it."""
    return os.environ.get("SYNCNORM_TRANSPORT") or "auto"


def checked_transport(name: str) -> TransportName:
    """``name``, if it is one of the transports.

    Raises:
        InputError: it is not.
    """
    if name not in get_args(TransportName):
        raise InputError(
            f"the transport, from transport= or SYNCNORM_TRANSPORT, must be one of "
            f"{', '.join(get_args(TransportName))}, got {name!r}"
        )
    return name  # type: ignore[return-value]  # checked


def connect(
    name: TransportName, store: Store, rank: int, world_size: int, timeout_s: float, gloo: Connect
) -> Transport:
    """Connects the ranks of a group.

    Args:
        name: the same on all ranks. For "native", whose ranks exchange frames only under torch's Join, as for "auto".
        store: that all ranks share.
        rank: of this process in the group.
        world_size: the number of ranks of the group.
        timeout_s: how long a rank waits for the others in shared memory.
        gloo: creates a gloo group.

    Raises:
        SyncNormError: "shm", but no two ranks share memory; raised on all ranks.

    Collective: all ranks of the group.
    """
    connections = gloo(store, rank, world_size)
    flat = GlooTransport(connections, world_size)
    if name == "gloo":
        return flat
    unable = "" if native.library else f"there is no native code, {native.absent}"
    hosts = find_hosts(connections, rank, world_size, bytes_for(world_size), unable)
    if hosts.memory is None:
        if name == "shm":
            raise SyncNormError(
                f"rank {dist.get_rank()}: the transport shm was chosen, but ranks cannot share memory: "
                f"{hosts.reason}. With auto they would use gloo"
            )
        return flat
    here = next(index for index, rows in enumerate(hosts.rows) if rank in rows)
    rows = Rows(hosts.memory, world_size, rank, hosts.rows[here], timeout_s)
    if len(hosts.rows) == 1:
        return SharedMemoryTransport(rows, flat)
    leaders = None
    if rank == hosts.rows[here][0]:
        between = gloo(PrefixStore("leaders", store), here, len(hosts.rows))
        leaders = Leaders(between, hosts.rows, here)
    return TwoLevelTransport(rows, flat, hosts.rows, leaders)
