"""How ranks come to be connected: they wait for each other, compare their protocols, and only then call gloo.

gloo by itself waits for a rank that has died once for each of its neighbors, without a word.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist

from syncnorm.comm import threads
from syncnorm.comm.call import Call
from syncnorm.comm.failure_flags import Notices
from syncnorm.comm.frames import protocol
from syncnorm.comm.waiting import Waiting
from syncnorm.errors import SyncNormError

_PATIENCE = 0.3  # seconds between two looks at the other ranks
_CONNECT = 60.0  # seconds for connecting, once all ranks are there


def meet(notices: Notices, waiting: Waiting, call: Call, timeout: float) -> None:
    """Waits until all ranks have come to their first exchange.

    Raises:
        RuntimeError: they have not, in ``timeout`` seconds, or one has failed.
        SyncNormError: their frames differ, on all ranks alike.
    """
    notices.post("here", protocol())
    began = time.perf_counter()
    while len(here := notices.by_rank("here") or {}) < len(notices.ranks):
        seconds = time.perf_counter() - began
        waiting.look_around(call, 0, seconds)
        if seconds > timeout:
            raise RuntimeError(f"not all of them came to their first synced layer in {seconds:.0f} s")
        time.sleep(min(0.2, 0.002 + seconds / 20))
    if len(set(here.values())) > 1:
        told = "\n".join(f"  rank {rank}: {theirs}" for rank, theirs in here.items())
        raise SyncNormError(
            f"rank {notices.rank}: the ranks run versions of syncnorm that do not understand each other:\n{told}\n"
            f"Install the same version on all of them."
        )


def reach(
    connect: Callable[[], dist.ProcessGroup], waiting: Waiting, call: Call, timeout: float
) -> dist.ProcessGroup:
    """What ``connect`` returns, which runs in a thread, so that this rank can look around.

    Raises:
        RuntimeError: it has not returned in ``timeout`` seconds or a minute, or another rank has failed.
        BaseException: what ``connect`` raises.
    """
    made: list[dist.ProcessGroup | BaseException] = []

    def run() -> None:
        try:
            made.append(connect())
        except BaseException as error:
            made.append(error)

    thread = threads.start(run)
    began = time.perf_counter()
    thread.join(_PATIENCE)
    while thread.is_alive():
        seconds = time.perf_counter() - began
        waiting.look_around(call, 0, seconds)
        if seconds > min(timeout, _CONNECT) + 1:
            raise RuntimeError(f"no connection in {seconds:.0f} s")
        thread.join(_PATIENCE)
    if isinstance(made[0], BaseException):
        raise made[0]
    return made[0]


def copy_of(store: Any) -> Any:
    """The store over a connection of its own: who waits for an answer of a TCPStore blocks all others on the same."""
    with suppress(NotImplementedError, RuntimeError):  # a store that is written in Python has no copy
        return store.clone()
    return store


def timeout_of(group: dist.ProcessGroup) -> float:
    """Seconds that the ranks of ``group`` wait for each other."""
    timeout = None
    with suppress(RuntimeError):  # a group of GPUs alone has no backend for the CPU
        timeout = getattr(getattr(group._get_backend(torch.device("cpu")), "options", None), "_timeout", None)
    return (timeout or dist.default_pg_timeout).total_seconds()
