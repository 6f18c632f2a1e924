"""``selftest``: finds or starts the ranks, and has them prove that this machine gets the layer right."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

from syncnorm.testing import RankError
from syncnorm.tools.common.progress import ProgressFactory, silent
from syncnorm.tools.common.ranks import Ranks, ranks_for, world_size_for
from syncnorm.tools.selftest.cases import CASES
from syncnorm.tools.selftest.records import SelfTest
from syncnorm.tools.selftest.session import prove_on_rank

# Longer than a case takes to give up, so that its verdict comes first.
WAIT = timedelta(seconds=180)
TIMEOUT_S = 600.0


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
    kept: list[SelfTest] = []
    with ranks_for(world_size, TIMEOUT_S, cpu=cpu, wait=WAIT) as on_ranks:
        try:
            return on_ranks(_prove_on_rank, progress, keep=kept.append)
        except RankError as error:
            # A rank that crashed took the others' results with it, but for the record that rank 0 kept.
            if not kept:
                raise
            why = str(error).splitlines()[0]
            cases = (replace(case, message=why) if case.status == "fail" else case for case in kept[-1].cases)
            return replace(kept[-1], cases=tuple(cases))


def _prove_on_rank(ranks: Ranks, progress: ProgressFactory) -> SelfTest:
    with (progress if ranks.rank == 0 else silent)(len(CASES)) as tell:
        record = prove_on_rank(ranks, tell, CASES)
    ranks.keep(record)
    return record
