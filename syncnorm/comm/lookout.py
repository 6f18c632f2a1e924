"""Tells a rank which others wait for it in a synced layer, while it is somewhere else: in a barrier, or in DDP.

That rank's own error, if it comes to one, is that of the collective it waits in, and names no layer.
"""

import atexit
import threading
import time
import warnings
import weakref
from typing import Protocol

from syncnorm.comm.failure_flags import Notices

_PERIOD = 2.0  # seconds between two looks
_IDLE = 5.0  # seconds without an exchange, below which nobody can have waited for long

_exiting = threading.Event()
_threads: "weakref.WeakSet[Lookout]" = weakref.WeakSet()


class Watched(Protocol):
    """What the lookout has to know of an exchange."""

    calls: int
    ended: float  # the last one, in the seconds of time.monotonic; infinite while one is under way


class Lookout(threading.Thread):
    """A thread that ends with the exchange that it watches.

    Args:
        exchange: of this rank.
        notices: of its group, for the use of this thread alone.
    """

    def __init__(self, exchange: Watched, notices: Notices) -> None:
        super().__init__(name="syncnorm-lookout", daemon=True)
        self._exchange = weakref.ref(exchange)
        self._notices = notices
        _threads.add(self)

    def run(self) -> None:
        """Looks, when this rank has not come to an exchange for some seconds, who waits for it in the next one."""
        told = 0
        while not _exiting.wait(_PERIOD):
            exchange = self._exchange()
            if exchange is None:
                return
            calls, idle = exchange.calls, time.monotonic() - exchange.ended
            del exchange
            if idle > _IDLE and calls >= told:
                told = self._tell(calls, idle) or told

    def _tell(self, calls: int, idle: float) -> int:
        """Warns of those who wait; the number of the exchange that they wait in, or 0."""
        waiting = {rank: text.split(" ", 1) for rank, text in (self._notices.by_rank("waiting") or {}).items()}
        ahead = {rank: (int(number), call) for rank, (number, call) in waiting.items() if int(number) > calls}
        if not ahead:
            return 0
        told = "; ".join(f"rank {rank} in {call}" for rank, (_, call) in ahead.items())
        warnings.warn(
            f"rank {self._notices.rank} has called no synced layer for {idle:.0f} s, and is waited for: {told}. If "
            f"it waits as well, for example in a barrier or a collective of DDP, the ranks have fallen out of step",
            stacklevel=2,
        )
        return max(number for number, _ in ahead.values())


@atexit.register
def _end_all() -> None:
    # Not left to the interpreter: it ends threads inside of torch's code by an exception, which aborts the process.
    _exiting.set()
    for thread in list(_threads):
        if thread.is_alive():
            thread.join(1.5)
