"""How a rank learns that another one has failed: flags and short notes that ranks leave in the job's store."""

import atexit
import ctypes
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TypeVar

from syncnorm._torch_versions import Store

_ANSWER_S = 1.0  # how long to wait for the store; one that is reachable answers within milliseconds
_EXIT_S = 1.0  # how long the end of the process waits for threads

T = TypeVar("T")

_threads: "weakref.WeakSet[threading.Thread]" = weakref.WeakSet()


class FailureFlags:
    """The flags and notes of the ranks of one group.

    The store is accessed from a thread, because with the network cut torch's calls to it block for hours, whatever
    their timeout is. A store that does not answer, or that ended together with the rank that hosted it, is not a
    failure of the group, whose ranks have connections of their own. What the store would have answered is then
    unknown, which is not the same as "no".

    Args:
        store: a ``torch.distributed`` store that all ranks share.
        rank: this rank.
        ranks: the ranks of the group.
    """

    def __init__(self, store: Store, rank: int, ranks: Sequence[int]) -> None:
        self.store = store
        self.rank = rank
        self.ranks = ranks
        self._request: threading.Thread | None = None
        self._lock = threading.Lock()  # requests of several threads are made in turn, so that none is dropped
        self._unreachable = False

    def post(self, name: str, text: str) -> None:
        """Leaves a note of this rank, if the store is reachable."""
        self._ask(lambda: self.store.set(f"{name}/{self.rank}", text))

    def by_rank(self, name: str) -> dict[int, str] | None:
        """The notes of that name, by rank, without the ranks that left none. None if unknown."""

        def read() -> dict[int, str]:
            posted = [rank for rank in self.ranks if self.store.check([f"{name}/{rank}"])]
            return {rank: self.store.get(f"{name}/{rank}").decode() for rank in posted}

        return self._ask(read)

    def post_failure(self, reason: str) -> None:
        """Raises the flag: the exchanges of this rank have ended. ``reason`` may be empty."""

        def write() -> None:
            self.store.set(f"failed/{self.rank}", reason)
            self.store.set("failed", "1")

        self._ask(write)

    def any_failure(self) -> bool:
        """Whether the exchanges of any rank have ended. False also if unknown."""
        return bool(self._ask(lambda: self.store.check(["failed"])))

    def failures(self) -> dict[int, str] | None:
        """The reasons of the ranks that failed; None if unknown."""
        return self.by_rank("failed")

    def _ask(self, request: Callable[[], T]) -> T | None:
        answers: list[T] = []

        def ask() -> None:
            try:
                answers.append(request())
            except RuntimeError:  # torch.distributed's own errors are RuntimeErrors
                self._unreachable = True

        with self._lock:
            if self._unreachable or (self._request is not None and self._request.is_alive()):  # still unanswered
                return None
            self._request = start_thread(ask)
            self._request.join(_ANSWER_S)
        return answers[0] if answers else None


def start_thread(function: Callable[[], None]) -> threading.Thread:
    """Starts a thread for a call of torch that may never return. Nothing has to join it."""
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    _threads.add(thread)
    return thread


@atexit.register
def _end_threads() -> None:
    """Waits a moment for the threads, and prevents those that return later from aborting the process.

    Up to Python 3.13 a thread that returns from C++ to an interpreter that is shutting down is ended by unwinding its
    stack. C++ takes that for an error and calls its terminate handler, which aborts the process. A handler that
    sleeps keeps the thread where it is until the process has ended.

    Source: Python's ``PyThread_exit_thread`` and https://github.com/python/cpython/issues/87135.
    """
    deadline = time.monotonic() + _EXIT_S
    for thread in list(_threads):
        thread.join(max(0.0, deadline - time.monotonic()))
    if any(thread.is_alive() for thread in _threads):
        with suppress(OSError, AttributeError, TypeError):  # a C++ library other than GNU's; Windows
            set_terminate = ctypes.CDLL("libstdc++.so.6")._ZSt13set_terminatePFvvE
            set_terminate.argtypes, set_terminate.restype = [ctypes.c_void_p], ctypes.c_void_p
            set_terminate(ctypes.cast(ctypes.CDLL(None).pause, ctypes.c_void_p))
