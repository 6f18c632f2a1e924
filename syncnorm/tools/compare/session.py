"""A comparison as one rank lives through it: arm after arm, together with the other ranks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from syncnorm.tools.common.provenance import provenance
from syncnorm.tools.common.ranks import Ranks
from syncnorm.tools.compare.arm_run import Session
from syncnorm.tools.compare.arms import ARMS
from syncnorm.tools.compare.problem import Problem
from syncnorm.tools.compare.progress import ProgressFactory, silent
from syncnorm.tools.compare.records import Comparison, Settings, Task
from syncnorm.tools.compare.verdict import verdict

if TYPE_CHECKING:
    from accelerate import Accelerator


def compare_on_rank(
    ranks: Ranks, problem: Problem, task: Task, settings: Settings, command: str, open_progress: ProgressFactory
) -> Comparison:
    """Trains and measures every arm of ``settings``; the same record on every rank.

    Collective: all ranks.
    """
    started = time.perf_counter()
    # May import what takes seconds, and no arm should be charged with them.
    datasets = problem.datasets()
    with accelerator_for(ranks) as accelerator:
        # So does the first optimiser, the first DDP and the first collectives.
        with silent(1) as progress:
            short = replace(settings, steps=1, parity_steps=1, seeds=settings.seeds[:1])
            Session(problem, task, datasets, short, ranks, accelerator, progress).run(ARMS["ddp+syncbn"])
        watcher = open_progress if ranks.rank == 0 else silent
        with watcher(len(settings.arms)) as progress:
            session = Session(problem, task, datasets, settings, ranks, accelerator, progress)
            results = tuple(session.run(ARMS[name]) for name in settings.arms)
    comparison = Comparison(
        settings=settings,
        task=task,
        **provenance(ranks.hardware()),
        command=command,
        arms=results,
        spread=session.spread,
        wall_seconds=time.perf_counter() - started,
    )
    comparison = replace(comparison, verdict=tuple(verdict(comparison)))
    return ranks.share(comparison if ranks.rank == 0 else None)


@contextmanager
def accelerator_for(ranks: Ranks) -> Iterator[Accelerator]:
    """Accelerate on the process group that exists; forgotten again afterwards, as a kept rank gets another one."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState

    ours = not PartialState._shared_state
    try:
        # Full precision whatever a launcher was configured for: arms are compared to fp32 rounding.
        yield Accelerator(cpu=ranks.device.type != "cuda", mixed_precision="no")
    finally:
        AcceleratorState._reset_state(reset_partial_state=ours)
