"""Turns SIGTERM and SIGHUP into exceptions, so that started ranks are ended and temporary folders removed."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class SignalExit(SystemExit):
    """A signal ended the command. `code` is 128 plus its number, as in a shell."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.name = signal.Signals(number).name


@contextmanager
def signals_as_exceptions() -> Iterator[None]:
    """Makes the signals raise `SignalExit`. Not under a launcher: it ends its ranks even inside of a collective."""
    names = () if "RANK" in os.environ else ("SIGTERM", "SIGHUP")
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    # A signal that is ignored stays ignored, as SIGHUP under nohup.
    ours = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL]

    def exit_on(number: int, frame: FrameType | None) -> None:
        for each in ours:
            signal.signal(each, signal.SIG_IGN)  # `timeout` sends two, and the second would interrupt the cleanup
        raise SignalExit(number)

    for number in ours:
        signal.signal(number, exit_on)
    try:
        yield
    finally:
        for number in ours:
            if signal.getsignal(number) is exit_on:
                signal.signal(number, signal.SIG_DFL)
