"""The self-test as one rank lives through it: case after case, whose verdicts all ranks hear."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress

import torch
import torch.distributed as dist

from syncnorm.tools.common.provenance import provenance
from syncnorm.tools.common.ranks import Ranks
from syncnorm.tools.selftest.case_context import Trial
from syncnorm.tools.selftest.cases import Case
from syncnorm.tools.selftest.models import PATIENCE
from syncnorm.tools.selftest.records import CaseResult, SelfTest, outcome


def prove_on_rank(ranks: Ranks, tell: Callable[[str], None], cases: Sequence[Case]) -> SelfTest:
    """Runs ``cases``; the same record on every rank that lives to see the end.

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
                result = _run(case, ranks, group)
            except Exception as error:  # the ranks no longer hear each other
                lost = f"after {case.name!r} the ranks no longer reach each other"
                result = CaseResult(case.name, "fail", message=f"lost the other ranks: {_one_line(error)}")
            if result.status == "fail" and group is not None:
                # Ranks may have left it at different points.
                with suppress(RuntimeError):
                    dist.destroy_process_group(group)
                group = None
        else:
            result = CaseResult(case.name, "not run", message=lost)
        results.append(result)
    if group is not None:
        dist.destroy_process_group(group)
    return SelfTest(
        world_size=ranks.world_size,
        **provenance(ranks.hardware()),
        cases=tuple(results),
        wall_seconds=time.perf_counter() - started,
    )


def _run(case: Case, ranks: Ranks, group: dist.ProcessGroup) -> CaseResult:
    started = time.perf_counter()
    trial = Trial(ranks.rank, ranks.world_size, ranks.device, ranks.backend, group, ranks.control)
    reasons = {rank: reason for rank, reason in enumerate(ranks.collect([case.unless(trial)])) if reason != [None]}
    if reasons:
        rank, (reason,) = next(iter(reasons.items()))
        where = "" if len(reasons) == ranks.world_size else f"rank {rank}: "
        return CaseResult(case.name, "skip", message=f"{where}{reason}")
    try:
        case.run(trial)
    except Exception as error:
        trial.verdict.error = _one_line(error)
    return outcome(case.name, ranks.collect(trial.verdict), time.perf_counter() - started)


def _new_group(ranks: Ranks) -> dist.ProcessGroup:
    """A group under test that works: on a GPU whose context an error ended, nothing does.

    Raises:
        RuntimeError: it does not, on all ranks alike.
    """
    group = dist.new_group(timeout=PATIENCE)
    assert isinstance(group, dist.ProcessGroup)
    error = None
    try:
        ones = torch.ones(1, device=ranks.device)
        dist.all_reduce(ones, group=group)
        if ones.item() != ranks.world_size:
            error = f"an all_reduce of ones gave {ones.item()}"
    except RuntimeError as raised:
        error = _one_line(raised)
    wrong = [found for (found,) in ranks.collect((error,)) if found is not None]
    if wrong:
        raise RuntimeError(f"a bare all_reduce failed: {wrong[0]}")
    return group


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"
