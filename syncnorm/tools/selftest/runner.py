"""``selftest``: uses or starts ranks, and runs the cases on them one after another."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist

from syncnorm._torch_versions import destroy_process_group
from syncnorm.testing import RankError
from syncnorm.tools.common.errors import one_line
from syncnorm.tools.common.progress import ProgressFactory, Tell, silent
from syncnorm.tools.common.provenance import provenance
from syncnorm.tools.common.ranks import Ranks, ranks_for, world_size_for
from syncnorm.tools.selftest.case_context import CaseContext
from syncnorm.tools.selftest.cases import CASE_TIMEOUT, CASES, Case
from syncnorm.tools.selftest.records import CaseResult, SelfTest, combine

# Longer than CASE_TIMEOUT, so that a case times out before the collection of its verdicts does.
WAIT = timedelta(seconds=180)
TIMEOUT_S = 600.0


def selftest(ranks: int | None = None, cpu: bool = False, progress: ProgressFactory = silent) -> SelfTest:
    """Runs every case on ranks of this machine or of a launcher, and compares with fp64.

    Args:
        ranks: number of ranks to start, over gloo on the CPU; 2 by default. Under a launcher, its number or None.
        cpu: under a launcher, use gloo on the CPU even if there are GPUs.
        progress: opened by rank 0, in its own process, to show the cases as they begin.

    Returns:
        The result, the same on every rank. A case that fails does not raise.

    Raises:
        InputError: the number of ranks is not possible.
        RankError: a rank that was started died before it had a result.

    Collective: under a launcher, all ranks.
    """
    world_size = world_size_for("selftest", ranks, least=1)
    kept: list[SelfTest] = []
    with ranks_for(world_size, TIMEOUT_S, cpu=cpu, wait=WAIT) as on_ranks:
        try:
            return on_ranks(_selftest_on_rank, progress, keep=kept.append)
        except RankError as error:
            # A rank that crashed ends the call on all ranks. What is left is the record that rank 0 kept.
            if not kept:
                raise
            why = str(error).splitlines()[0]
            cases = (replace(case, message=why) if case.status == "fail" else case for case in kept[-1].cases)
            return replace(kept[-1], cases=tuple(cases))


def _selftest_on_rank(ranks: Ranks, progress: ProgressFactory) -> SelfTest:
    with (progress if ranks.rank == 0 else silent)(len(CASES)) as tell:
        record = run_cases(ranks, tell, CASES)
    ranks.keep(record)
    return record


def run_cases(ranks: Ranks, tell: Tell, cases: Sequence[Case]) -> SelfTest:
    """Runs ``cases``; returns the same record on every rank that survives them.

    Collective: all ranks.
    """
    started = time.perf_counter()
    results: list[CaseResult] = []
    group: dist.ProcessGroup | None = None
    lost = None
    for case in cases:
        tell(case.name)
        if lost is None:
            try:
                if group is None:
                    group = _new_group(ranks)
                result = _run_case(case, ranks, group)
            except Exception as error:  # the ranks can no longer communicate
                lost = f"the ranks can no longer communicate after {case.name!r}"
                result = CaseResult(case.name, "fail", message=f"lost the other ranks: {one_line(error)}")
            if result.status == "fail" and group is not None:
                # The ranks may have stopped at different collectives of this group.
                with suppress(RuntimeError):
                    dist.destroy_process_group(group)
                group = None
        else:
            result = CaseResult(case.name, "not run", message=lost)
        results.append(result)
    if group is not None:
        destroy_process_group(group)
    return SelfTest(
        world_size=ranks.world_size,
        **provenance(ranks.hardware()),
        cases=tuple(results),
        wall_seconds=time.perf_counter() - started,
    )


def _run_case(case: Case, ranks: Ranks, group: dist.ProcessGroup) -> CaseResult:
    started = time.perf_counter()
    context = CaseContext(ranks.rank, ranks.world_size, ranks.device, ranks.backend, group, ranks.control)
    # In tuples, because `collect` leaves out None.
    found = [reason for (reason,) in ranks.collect((case.unless(context),))]
    reasons = {rank: reason for rank, reason in enumerate(found) if reason is not None}
    if reasons:
        rank, reason = next(iter(reasons.items()))
        where = "" if len(reasons) == ranks.world_size else f"rank {rank}: "
        return CaseResult(case.name, "skip", message=f"{where}{reason}")
    try:
        case.run(context)
    except Exception as error:
        context.verdict.error = one_line(error)
    return combine(case.name, ranks.collect(context.verdict), time.perf_counter() - started)


def _new_group(ranks: Ranks) -> dist.ProcessGroup:
    """A new group to test, in which an all_reduce works: none does after an error has ended a GPU's context.

    Raises:
        RuntimeError: the all_reduce failed on some rank. Raised on all ranks.
    """
    group = dist.new_group(timeout=CASE_TIMEOUT)
    assert isinstance(group, dist.ProcessGroup)
    failure = None
    try:
        ones = torch.ones(1, device=ranks.device)
        dist.all_reduce(ones, group=group)
        if ones.item() != ranks.world_size:
            failure = f"an all_reduce of ones returned {ones.item()}"
    except RuntimeError as error:
        failure = one_line(error)
    failures = [each for (each,) in ranks.collect((failure,)) if each is not None]
    if failures:
        raise RuntimeError(f"an all_reduce without syncnorm failed: {failures[0]}")
    return group
