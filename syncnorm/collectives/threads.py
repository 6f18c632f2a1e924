"""Threads for calls of torch that may never return."""

import atexit
import threading
import time
import weakref
from collections.abc import Callable

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
    """Waits a moment: up to Python 3.13 a thread that comes back from torch to an exiting interpreter aborts it."""
    deadline = time.monotonic() + _AT_EXIT
    for thread in list(_started):
        thread.join(max(0.0, deadline - time.monotonic()))
