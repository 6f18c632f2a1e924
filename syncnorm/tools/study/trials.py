"""Training runs shared out over the ranks: some need all of them, some one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from syncnorm.tools.common.progress import Tell
from syncnorm.tools.common.ranks import Ranks

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Trials(Generic[T]):
    """What is to be run.

    Attributes:
        together: all ranks run each of these, in this order.
        alone: each is run by one rank, on its own, while the others run theirs. Put trials that cost alike next to
            each other: rank r takes every ``world_size``-th, from the r-th on.
    """

    together: Sequence[T] = ()
    alone: Sequence[T] = ()

    def num_stages(self, world_size: int) -> int:
        """How many of them rank 0 runs."""
        return len(self.together) + len(self.alone[::world_size])


def run_trials(
    trials: Trials[T], work: Callable[[T, Ranks, bool], Sequence[R]], ranks: Ranks, tell: Callable[[T], None]
) -> list[R]:
    """What ``work(trial, ranks, together)`` gave for each trial, in order, on all ranks; together, rank 0's.

    Args:
        trials: the same on all ranks.
        work: runs one trial. Where ``together`` is False it must call no collective.
        ranks: this process among the others.
        tell: called before each trial.

    Collective: all ranks: what ``work`` does together, and an object gather.
    """
    found: dict[int, Sequence[R]] = {}

    def run(index: int, trial: T, together: bool) -> None:
        tell(trial)
        found[index] = work(trial, ranks, together)
        ranks.keep(found[index])

    for index, trial in enumerate(trials.together):
        run(index, trial, True)
    for index in range(ranks.rank, len(trials.alone), ranks.world_size):
        run(len(trials.together) + index, trials.alone[index], False)
    # The last to write wins: rank 0.
    by_index = {index: results for of_rank in reversed(ranks.collect(found)) for index, results in of_rank.items()}
    for index in by_index.keys() - found.keys():
        ranks.keep(by_index[index])
    return [result for index in sorted(by_index) for result in by_index[index]]


def labelled(tell: Tell) -> Callable[[object], None]:
    """A ``tell`` for `run_trials` that says ``str(trial)``."""
    return lambda trial: tell(str(trial))
