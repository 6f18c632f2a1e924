"""SIGTERM and SIGHUP as exceptions, so that ranks end and temporary folders go."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Ended(SystemExit):
    """A signal ended the command; `code` is what a shell says of it."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.name = signal.Signals(number).name


@contextmanager
def raised_as_exceptions() -> Iterator[None]:
    """Has the signals raise `Ended`, but under a launcher, whose ranks are to end at once, also in a collective."""
    names = () if "RANK" in os.environ else ("SIGTERM", "SIGHUP")
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    # Not where it is ignored, as under nohup.
    ours = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL]

    def end(number: int, frame: FrameType | None) -> None:
        for each in ours:
            signal.signal(each, signal.SIG_IGN)  # timeout sends two, and the second would end the cleaning up
        raise Ended(number)

    for number in ours:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in ours:
            if signal.getsignal(number) is end:
                signal.signal(number, signal.SIG_DFL)
