"""What a study tells its watcher: what it does now."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

Tell = Callable[[str], None]
# Opened in the process of rank 0, which may be a spawned one: therefore a factory, and one that pickles.
ProgressFactory = Callable[[int], AbstractContextManager[Tell]]


def silent(total: int) -> AbstractContextManager[Tell]:
    """The factory of a watcher that nobody watches."""
    return nullcontext(_nothing)


def _nothing(label: str) -> None:
    """What rank 0 would hear."""
