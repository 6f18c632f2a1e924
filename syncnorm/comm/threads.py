"""Threads for calls of torch that may never return."""

import atexit
import ctypes
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress

_AT_EXIT = 1.0  # seconds

_started: "weakref.WeakSet[threading.Thread]" = weakref.WeakSet()


def start(call: Callable[[], None]) -> threading.Thread:
    """A thread that runs ``call``, and that nobody has to wait for."""
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    _started.add(thread)
    return thread


@atexit.register
def _let_them_end() -> None:
    """Waits a moment for the threads, and sees to it that those which come back later do no harm.

    Up to Python 3.13 a thread that returns from C++ to an interpreter that is ending is ended by unwinding its stack.
    C++ takes that for an error and calls its terminate handler, which aborts the process. A handler that sleeps
    leaves the thread where it is until the process has ended.

    Source: Python's ``PyThread_exit_thread`` and https://github.com/python/cpython/issues/87135.
    """
    deadline = time.monotonic() + _AT_EXIT
    for thread in list(_started):
        thread.join(max(0.0, deadline - time.monotonic()))
    if any(thread.is_alive() for thread in _started):
        with suppress(OSError, AttributeError):  # another C++ library than GNU's
            set_terminate = ctypes.CDLL("libstdc++.so.6")._ZSt13set_terminatePFvvE
            set_terminate.argtypes, set_terminate.restype = [ctypes.c_void_p], ctypes.c_void_p
            set_terminate(ctypes.cast(ctypes.CDLL(None).pause, ctypes.c_void_p))
