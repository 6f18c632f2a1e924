"""How a command tells what it is doing: one label for each stage, from rank 0."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

# Called with the label of the stage that begins.
Tell = Callable[[str], None]
# Opened with the number of stages. Rank 0 opens it in its own process, which may be a spawned one: it must pickle.
ProgressFactory = Callable[[int], AbstractContextManager[Tell]]


def silent(total: int) -> AbstractContextManager[Tell]:
    """A `ProgressFactory` that shows nothing."""
    return nullcontext(_ignore)


def _ignore(label: str) -> None:
    pass
