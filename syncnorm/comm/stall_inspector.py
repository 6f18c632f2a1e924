"""What a rank does while it waits: checks whether another one has failed, and after ten seconds warns who is missing.

The inspector works on the rank that waits. The watchdog works on the rank that is waited for while it is somewhere
else, for example in a barrier or in DDP: the error of that collective, if it ever raises, would name no layer. It
also looks for failed ranks where nothing else does, because values travel in native collectives.
"""

import atexit
import threading
import time
import warnings
import weakref
from typing import Protocol

from syncnorm.comm.call import Call, Kind
from syncnorm.comm.failure_flags import FailureFlags

_POST_AFTER_S = 1.0  # after this wait a rank notes in the store what it waits in
_WARN_AFTER_S = 10.0  # after this wait it warns its user
_ROLL_CALL_S = 0.6  # how long a rank that failed waits for the other ranks to report that they failed too
_WATCHDOG_PERIOD_S = 2.0  # between two checks of the watchdog
_WATCHDOG_IDLE_S = 5.0  # time without an exchange before the watchdog asks the store


class StallInspector:
    """Watches the other ranks of a group while this one waits for them.

    Args:
        flags: of the group.
    """

    def __init__(self, flags: FailureFlags) -> None:
        self._flags = flags
        self._posted = ""
        self._warned: set[tuple[Kind, str]] = set()

    def check(self, call: Call, number: int, seconds: float) -> None:
        """To be called repeatedly by a rank that has waited for ``seconds`` in exchange ``number``.

        Raises:
            RuntimeError: the exchanges of another rank have ended.

        Warns:
            UserWarning: after ten seconds, once per layer, with the ranks that are missing.
        """
        if self._flags.any_failure():
            raise RuntimeError("the exchange of another rank failed")
        note = f"{number} {call}"
        if seconds > _POST_AFTER_S and self._posted != note:
            self._flags.post("waiting", note)
            self._posted = note
        if seconds > _WARN_AFTER_S and (call.kind, call.layer) not in self._warned:
            self._warned.add((call.kind, call.layer))
            notes = self._flags.by_rank("waiting")
            here = None if notes is None else [r for r, text in notes.items() if text.split()[0] == str(number)]
            missing = None if here is None else [rank for rank in self._others() if rank not in here]
            warnings.warn(
                f"rank {self._flags.rank} has waited {seconds:.0f} s for {_names(missing)} in {call}. If only some "
                f"ranks run this forward, for example for evaluation: was `model.eval()` forgotten? A forward in "
                f"training mode that only some ranks run belongs under `with syncnorm.no_sync_stats():`. Otherwise "
                f"the other ranks are slow, or they wait somewhere else, for example in a collective of DDP",
                stacklevel=2,
            )

    def explain_failure(self, call: Call, error: BaseException, reason: str = "") -> str:
        """The message of the error for a rank that stops waiting. Reports the failure to the other ranks first.

        Args:
            call: what this rank waited in.
            error: what ended the wait.
            reason: what the other ranks need to know in addition.
        """
        self._flags.post_failure(reason)
        failures = self._flags.failures()
        deadline = time.monotonic() + _ROLL_CALL_S
        while failures is not None and len(failures) < len(self._flags.ranks) and time.monotonic() < deadline:
            time.sleep(0.05)
            failures = self._flags.failures()
        reasons = {rank: text for rank, text in (failures or {}).items() if text}
        if reasons:
            awaited = " and ".join(f"rank {rank}, which {text}" for rank, text in reasons.items())
        else:
            missing = None if failures is None else [rank for rank in self._others() if rank not in failures]
            awaited = "a rank that failed too" if missing == [] else _names(missing)
            awaited += (
                ". A rank that is missing has died, has raised an error (look for the first error on the other "
                "ranks), does not run this layer, or waits in a collective of DDP"
            )
        failed = f"rank {self._flags.rank}: {call} over ranks {self._flags.ranks} failed"
        return f"{failed} while waiting for {awaited}. The backend reported: {error}"

    def _others(self) -> list[int]:
        return [rank for rank in self._flags.ranks if rank != self._flags.rank]


def _names(missing: list[int] | None) -> str:
    return f"ranks {missing}" if missing else "other ranks (which ones is unknown: the job's store does not answer)"


class Watched(Protocol):
    """What the watchdog reads of an exchange."""

    calls: int
    idle_since: float  # when the last exchange ended, by time.monotonic; infinite during an exchange

    @property
    def watches(self) -> bool:
        """Whether it wants to know of failed ranks while it waits in no exchange."""

    def peers_failed(self, failures: dict[int, str]) -> None:
        """Called once, with the reasons of the ranks that failed."""


class StallWatchdog(threading.Thread):
    """A thread that warns when other ranks wait for this one. It ends with the exchange that it watches.

    Args:
        exchange: of this rank.
        flags: of its group; no other thread may use this object.
    """

    def __init__(self, exchange: Watched, flags: FailureFlags) -> None:
        super().__init__(name="syncnorm-stall-watchdog", daemon=True)
        self._exchange = weakref.ref(exchange)
        self._flags = flags
        _watchdogs.add(self)

    def run(self) -> None:
        """Checks, if this rank has made no exchange for some seconds, whether others wait for it in the next one."""
        warned = 0
        while not _exiting.wait(_WATCHDOG_PERIOD_S):
            exchange = self._exchange()
            if exchange is None:
                return
            calls, idle_s = exchange.calls, time.monotonic() - exchange.idle_since
            if exchange.watches and self._flags.any_failure():
                return exchange.peers_failed(self._flags.failures() or {})
            del exchange
            if idle_s > _WATCHDOG_IDLE_S and calls >= warned:
                warned = self._warn(calls, idle_s) or warned

    def _warn(self, calls: int, idle_s: float) -> int:
        """Warns of ranks that wait. Returns the number of the exchange that they wait in, or 0 if none waits."""
        waiting = {rank: text.split(" ", 1) for rank, text in (self._flags.by_rank("waiting") or {}).items()}
        ahead = {rank: (int(number), call) for rank, (number, call) in waiting.items() if int(number) > calls}
        if not ahead:
            return 0
        who = "; ".join(f"rank {rank} in {call}" for rank, (_, call) in ahead.items())
        warnings.warn(
            f"rank {self._flags.rank} has called no synced layer for {idle_s:.0f} s, but other ranks wait for it: "
            f"{who}. If this rank waits too, for example in a barrier or in a collective of DDP, the ranks are "
            f"out of step",
            stacklevel=2,
        )
        return max(number for number, _ in ahead.values())


_exiting = threading.Event()
_watchdogs: "weakref.WeakSet[StallWatchdog]" = weakref.WeakSet()


@atexit.register
def _end_watchdogs() -> None:
    # The interpreter would end a thread inside of torch's code by an exception, which aborts the process.
    _exiting.set()
    for thread in list(_watchdogs):
        if thread.is_alive():
            thread.join(1.5)
