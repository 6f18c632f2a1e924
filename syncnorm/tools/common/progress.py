"""How a command reports what it is doing: one label per stage, on rank 0."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

# Called with the label of each stage when it begins.
Tell = Callable[[str], None]
# Called with the number of stages, in the process of rank 0. That may be a spawned process, so it must pickle.
ProgressFactory = Callable[[int], AbstractContextManager[Tell]]


def silent(total: int) -> AbstractContextManager[Tell]:
    """A `ProgressFactory` that shows nothing."""
    return nullcontext(_ignore)


def _ignore(label: str) -> None:
    pass
