"""``run``: checks what is asked, finds or starts the ranks, and has them answer a question."""

from __future__ import annotations

import importlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from syncnorm.errors import InputError
from syncnorm.tools.common.progress import ProgressFactory, silent
from syncnorm.tools.common.provenance import command_line, provenance
from syncnorm.tools.common.ranks import Keep, Ranks, discard, ranks_for, torch_threads, world_size_for
from syncnorm.tools.study.records import Row, Settings, Study
from syncnorm.tools.study.registry import STUDIES
from syncnorm.tools.study.tuning import FIRST_SEED

QUICK_SEEDS = 2
MAX_RANKS = 64
# Only to end a run whose ranks hang.
TIMEOUT_S = 6 * 3600.0


def run(
    study: str,
    *,
    ranks: int | None = None,
    seeds: int | None = None,
    steps: int | None = None,
    quick: bool = False,
    progress: ProgressFactory = silent,
    keep: Keep = discard,
) -> Study:
    """Answers one question by training runs on real data, on the CPU, one thread a rank.

    Under a launcher it uses the ranks that it was given; alone it starts gloo ranks on this machine.

    Args:
        study: a name out of ``STUDIES``.
        ranks: how many ranks to start; 2 by default. Under a launcher it must agree with the launcher's.
        seeds: runs of each condition, at least 2; the study's own number by default.
        steps: optimiser steps of a run; the study's own number by default.
        quick: few steps and conditions, to see that it works.
        progress: opened by rank 0, in its own process, to follow the run.
        keep: called on rank 0 with a record of the runs that are done, at the latest before an error is raised.

    Returns:
        The record, the same on every rank.

    Raises:
        InputError: an argument that cannot be used. Judged before anything starts, alike on every rank.
        ModuleNotFoundError: a package that the study needs is missing, likewise.

    Collective: under a launcher, all ranks.
    """
    if study not in STUDIES:
        raise InputError(f"no study is called {study!r}: the studies are {', '.join(STUDIES)}")
    question = STUDIES[study]
    settings = Settings(
        study=study,
        world_size=world_size_for("study", ranks),
        seeds=_given(seeds, QUICK_SEEDS if quick else question.seeds),
        steps=_given(steps, question.quick_steps if quick else question.steps),
        quick=quick,
    )
    # Below two seeds there is no difference that they could agree on.
    for name, value, least in (("seeds", settings.seeds, 2), ("steps", settings.steps, 1)):
        if value < least:
            raise InputError(f"{name} must be at least {least}, got {value}")
    # Seeds from there on are for tuning; more ranks would need more images than there are.
    for name, value, most in (("seeds", settings.seeds, FIRST_SEED), ("ranks", settings.world_size, MAX_RANKS)):
        if value > most:
            raise InputError(f"{name} must be at most {most}, got {value}")
    for package in question.needs:
        importlib.import_module(package)
    with torch_threads(1), ranks_for(settings.world_size, TIMEOUT_S, cpu=True) as on_ranks:
        return on_ranks(answer_on_rank, settings, command_line(), progress, keep=keep)


def _given(value: int | None, default: int) -> int:
    return default if value is None else value


def answer_on_rank(ranks: Ranks, settings: Settings, command: str, progress: ProgressFactory) -> Study:
    """Answers the question of ``settings``; the same record on every rank.

    Rank 0 keeps a record after each trial.

    Collective: all ranks.
    """
    started = time.perf_counter()
    question = STUDIES[settings.study]
    done: list[Row] = []

    def record(rows: Sequence[Row], notes: Mapping[str, str], findings: Sequence[str]) -> Study:
        return Study(
            question=question.question,
            claim=question.claim,
            settings=settings,
            notes=dict(notes),
            rows=tuple(rows),
            views=tuple(question.views(rows)),
            findings=tuple(findings),
            **provenance(ranks.hardware()),
            command=command,
            wall_seconds=time.perf_counter() - started,
        )

    def keep_rows(rows: Sequence[Row]) -> None:
        done.extend(rows)
        ranks.keep(record(done, {}, ()))  # findings are of all rows

    is_main = ranks.rank == 0
    with (progress if is_main else silent)(question.num_stages(settings)) as tell:
        outcome = question.run(settings, replace(ranks, keep=keep_rows if is_main else discard), tell)
    study = record(outcome.rows, outcome.notes, question.find(outcome.rows))
    return ranks.share(study if ranks.rank == 0 else None)
