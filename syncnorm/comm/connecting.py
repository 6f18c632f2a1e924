"""How the ranks of a group find one another: they meet in the job's store, compare their wire formats, then connect.

They meet first because gloo, when a rank has died, silently waits once for each of that rank's neighbors.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import torch
import torch.distributed as dist

from syncnorm._torch_versions import Store, copied
from syncnorm.comm.call import Call
from syncnorm.comm.failure_flags import FailureFlags, start_thread
from syncnorm.comm.frames import protocol
from syncnorm.comm.stall_inspector import StallInspector
from syncnorm.errors import SyncNormError

_POLL_S = 0.3  # between two checks of the other ranks while this one connects
_CONNECT_S = 60.0  # for connecting, after all ranks have met

T = TypeVar("T")


def connect_ranks(
    connect: Callable[[Store], T], flags: FailureFlags, inspector: StallInspector, call: Call, timeout_s: float
) -> T:
    """What ``connect`` returns for the job's store; all ranks must have met.

    Raises:
        RuntimeError: the ranks have not connected after ``timeout_s``, or another rank has failed.
        BaseException: what ``connect`` raises.
    """
    # A copy has its own connection: while a call waits for an answer of a TCPStore, it blocks all others on the same.
    store = copied(flags.store)
    return _in_thread(lambda: connect(store), inspector, call, timeout_s)


def meet(
    flags: FailureFlags, inspector: StallInspector, call: Call, timeout_s: float, transport: str, native_settings: str
) -> None:
    """Waits until all ranks have come to their first exchange, and compares their settings and wire formats.

    Args:
        flags: of the ranks.
        inspector: of the ranks.
        call: that this rank is about to make.
        timeout_s: how long to wait.
        transport: that was chosen on this rank.
        native_settings: what the environment of this rank chooses for native collectives.

    Raises:
        RuntimeError: after ``timeout_s`` the ranks have not met, or another rank has failed.
        SyncNormError: they have different settings or wire formats; raised on all ranks.
    """
    flags.post("here", f"{transport}\n{native_settings}\n{protocol()}")
    began = time.perf_counter()
    while len(notes := flags.by_rank("here") or {}) < len(flags.ranks):
        seconds = time.perf_counter() - began
        inspector.check(call, 0, seconds)
        if seconds > timeout_s:
            raise RuntimeError(f"not all ranks came to their first synced layer within {seconds:.0f} s")
        time.sleep(min(0.2, 0.002 + seconds / 20))
    chosen, settings, protocols = ({rank: _parts(note)[part] for rank, note in notes.items()} for part in range(3))
    _check_equal(
        flags.rank, protocols, "the ranks run incompatible versions of syncnorm",
        "Install the same version on all ranks",
    )  # fmt: skip
    _check_equal(
        flags.rank, chosen, "the ranks chose different transports",
        "Set SYNCNORM_TRANSPORT, or transport= of syncnorm.convert, to the same value on all ranks",
    )  # fmt: skip
    _check_equal(
        flags.rank, settings, "the ranks have different settings",
        "Set these variables to the same values on all ranks",
    )  # fmt: skip


def _parts(note: str) -> tuple[str, str, str]:
    """Transport, settings and wire format; older versions note no settings."""
    transport, _, rest = note.partition("\n")
    settings, _, wire_format = rest.rpartition("\n")
    return transport, settings, wire_format


def _check_equal(rank: int, by_rank: dict[int, str], problem: str, advice: str) -> None:
    if len(set(by_rank.values())) > 1:
        lines = "\n".join(f"  rank {r}: {text}" for r, text in by_rank.items())
        raise SyncNormError(f"rank {rank}: {problem}:\n{lines}\n{advice}.")


def _in_thread(connect: Callable[[], T], inspector: StallInspector, call: Call, timeout_s: float) -> T:
    """Runs ``connect`` in a thread, so that this rank can check the others meanwhile."""
    results: list[T | BaseException] = []

    def run() -> None:
        try:
            results.append(connect())
        except BaseException as error:
            results.append(error)

    thread = start_thread(run)
    began = time.perf_counter()
    thread.join(_POLL_S)
    while thread.is_alive():
        seconds = time.perf_counter() - began
        inspector.check(call, 0, seconds)
        if seconds > min(timeout_s, _CONNECT_S) + 1:
            raise RuntimeError(f"no connection within {seconds:.0f} s")
        thread.join(_POLL_S)
    if isinstance(results[0], BaseException):
        raise results[0]
    return results[0]


def timeout_of(group: dist.ProcessGroup, device: str = "cpu") -> float:
    """The timeout of ``group`` in seconds, for collectives on devices of that type."""
    timeout = None
    with suppress(RuntimeError):  # a group for GPUs only has no backend for the CPU
        timeout = getattr(getattr(group._get_backend(torch.device(device)), "options", None), "_timeout", None)
    return (timeout or dist.default_pg_timeout).total_seconds()
