"""What a comparison tells its watcher while it runs: an interface, and the watcher that is silent."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from syncnorm.tools.compare.records import ArmResult


class Progress(Protocol):
    """Calls that rank 0 makes; the other ranks talk to `Silent`."""

    def start(self, label: str, steps: int) -> None:
        """An arm begins, of ``steps`` training steps."""

    def step(self) -> None:
        """One training step of it is done."""

    def finish(self, result: ArmResult) -> None:
        """The arm is done."""


class Silent:
    """Nobody watches."""

    def start(self, label: str, steps: int) -> None:
        """Nothing."""

    def step(self) -> None:
        """Nothing."""

    def finish(self, result: ArmResult) -> None:
        """Nothing."""


# Opened in the process of rank 0, which may be a spawned one: therefore a factory, and one that pickles.
ProgressFactory = Callable[[int], AbstractContextManager[Progress]]


def silent(num_arms: int) -> AbstractContextManager[Progress]:
    """The factory of `Silent`."""
    return nullcontext(Silent())
