"""``selftest``: finds or starts the ranks, and has them prove that this machine gets the layer right."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from datetime import timedelta

import torch

from syncnorm.diagnostics.selftest_cases import CASES
from syncnorm.diagnostics.selftest_records import SelfTest
from syncnorm.diagnostics.selftest_session import prove_on_rank
from syncnorm.launcher import launched_world_size
from syncnorm.notes import Keep, run_noting
from syncnorm.ranks import initialised_ranks, launched_ranks, world_size_for
from syncnorm.testing import RankError

# Opened in the process of rank 0, with the number of cases; what it gives is called with the name of each.
ProgressFactory = Callable[[int], AbstractContextManager[Callable[[str], None]]]

# Longer than a case takes to give up, so that its verdict comes first.
WAIT = timedelta(seconds=180)
TIMEOUT = 600


def silent(total: int) -> AbstractContextManager[Callable[[str], None]]:
    """Nobody watches."""
    return nullcontext(lambda name: None)


def selftest(ranks: int | None = None, cpu: bool = False, progress: ProgressFactory = silent) -> SelfTest:
    """Runs the layer in every way that matters, on ranks of this machine or of a launcher, against fp64.

    Args:
        ranks: how many ranks to start, over gloo on the CPU; 2 by default. Under a launcher, its own number.
        cpu: not to use GPUs under a launcher either.
        progress: opened by rank 0, in its own process, to follow the run.

    Returns:
        The record, the same on every rank; a failure is in there and does not raise.

    Raises:
        InputError: a number of ranks that cannot be.
        RankError: a rank that was started died so early that there is nothing to tell.

    Collective: under a launcher, all ranks.
    """
    world_size = world_size_for("selftest", ranks, least=1)
    if launched_world_size() is None:
        return _start(world_size, progress)
    with launched_ranks(cpu, WAIT) as given, (progress if given.rank == 0 else silent)(len(CASES)) as tell:
        return prove_on_rank(given, tell, CASES)


def _start(world_size: int, progress: ProgressFactory) -> SelfTest:
    noted: list[SelfTest] = []
    try:
        return run_noting(_started_rank, world_size, (progress,), TIMEOUT, noted.append)[0]
    except RankError as error:
        # A rank that crashed took the others' results with it, but for what rank 0 had written down.
        if not noted:
            raise
        why = str(error).splitlines()[0]
        cases = (replace(case, message=why) if case.status == "fail" else case for case in noted[0].cases)
        return replace(noted[0], cases=tuple(cases))


def _started_rank(progress: ProgressFactory, note: Keep) -> SelfTest:
    with initialised_ranks(torch.device("cpu"), WAIT) as ranks:
        with (progress if ranks.rank == 0 else silent)(len(CASES)) as tell:
            record = prove_on_rank(ranks, tell, CASES)
        if ranks.rank == 0:
            note(record)
        return record
