"""How many seeds: a given number, or one more after the other until the results decide or a budget is used up."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import count

from syncnorm.tools.common.decision import MAX_SEEDS
from syncnorm.tools.common.ranks import Ranks
from syncnorm.tools.compare.paired import essential
from syncnorm.tools.compare.records import CompareSettings, Comparison

# Makes the record of the seeds that are done, after so many looks at the results.
MakeRecord = Callable[[Sequence[int], int], Comparison]


def run_seeds(
    train: Callable[[int], None], record: MakeRecord, settings: CompareSettings, ranks: Ranks
) -> tuple[list[int], int]:
    """Trains the seeds that ``settings`` asks for; the seeds, and how many times the results were judged meanwhile.

    With a budget, the results are judged after 3, 5, 8, 12, ... seeds, each time at a stricter level, because several
    looks are several chances of a wrong decision (`level_of_look`). Seeds that would exceed the budget are not
    started, except for the first.

    Collective: all ranks.
    """
    done: list[int] = []
    if settings.budget_seconds is None:
        for seed in settings.seeds:
            train(seed)
            done.append(seed)
            _keep(record, done, 0, ranks)
        return done, 0
    started = time.perf_counter()
    for look, target in enumerate(look_sizes(), 1):
        while len(done) < target and _in_time(started, len(done), settings.budget_seconds, ranks):
            train(settings.seeds[0] + len(done))
            done.append(settings.seeds[0] + len(done))
            _keep(record, done, look, ranks)
        if len(done) < target or ranks.share(_decided(record, done, look, ranks)):
            return done, look
    return done, look


def look_sizes() -> Iterator[int]:
    """Numbers of seeds at which results are judged: steps that grow, as the levels fall.

    Example:
        >>> list(look_sizes())[:5]
        [3, 5, 8, 12, 17]
    """
    size = 3
    for step in count(2):
        if size > MAX_SEEDS:
            return
        yield size
        size += step


def _in_time(started: float, done: int, budget_seconds: float, ranks: Ranks) -> bool:
    elapsed = time.perf_counter() - started
    return ranks.share(not done or elapsed * (done + 1) / done <= budget_seconds)


def _decided(record: MakeRecord, done: Sequence[int], look: int, ranks: Ranks) -> bool:
    if ranks.rank:
        return False  # rank 0 has all results
    found = [decision for decision in record(done, look).decisions if essential(decision)]
    return all(decision.kind != "undecided" for decision in found or record(done, look).decisions)


def _keep(record: MakeRecord, done: Sequence[int], looks: int, ranks: Ranks) -> None:
    if ranks.rank == 0:
        ranks.keep(record(done, looks))
