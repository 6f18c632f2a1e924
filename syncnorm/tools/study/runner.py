"""The studies by name, and `run`: checks the arguments, starts the ranks if needed, and runs a study on them."""

from __future__ import annotations

import importlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import inf

from syncnorm.errors import InputError
from syncnorm.tools.common.progress import ProgressFactory, silent
from syncnorm.tools.common.provenance import command_line, provenance
from syncnorm.tools.common.ranks import Keep, Ranks, discard, ranks_for, torch_threads, world_size_for
from syncnorm.tools.study import accumulation, batch_size, dp_vs_ddp, fold, learning_rate, placement, sequence
from syncnorm.tools.study.records import Question, Study, StudyRow, StudySettings
from syncnorm.tools.study.trials import FIRST_TUNING_SEED

STUDIES: dict[str, Question] = {
    study.QUESTION.name: study.QUESTION
    for study in (batch_size, placement, learning_rate, dp_vs_ddp, sequence, fold, accumulation)
}
QUICK_SEEDS = 2
MAX_RANKS = 64
# Ends a run whose ranks hang.
TIMEOUT_S = 6 * 3600.0


def run(
    study: str,
    *,
    ranks: int | None = None,
    seeds: int | None = None,
    steps: int | None = None,
    quick: bool = False,
    margin: float | None = None,
    progress: ProgressFactory = silent,
    keep: Keep = discard,
) -> Study:
    """Answers one question by training runs on real data, on the CPU, with one thread per rank.

    Under a launcher it uses the launched ranks; otherwise it starts gloo ranks on this machine.

    Args:
        study: a key of ``STUDIES``.
        ranks: number of ranks to start, 2 by default. Under a launcher it must equal the number of launched ranks.
        seeds: runs of each condition, at least 2; the default depends on the study.
        steps: optimizer steps per run; the default depends on the study.
        quick: few steps and conditions, to check that the study works.
        margin: largest difference that does not matter: 0.5 percentage points of accuracy by default, and 2 percent
            of the time in ``fold``.
        progress: opened on rank 0, in its process, to follow the run.
        keep: called on rank 0 with a record of the completed runs, at the latest before an error is raised.

    Returns:
        The record, the same on every rank.

    Raises:
        InputError: an argument is invalid. Checked before anything starts, so every rank raises it.
        ModuleNotFoundError: a package that the study needs is missing; also checked first.

    Collective: under a launcher, all ranks.
    """
    if study not in STUDIES:
        raise InputError(f"no study is called {study!r}: the studies are {', '.join(STUDIES)}")
    question = STUDIES[study]
    settings = StudySettings(
        study=study,
        world_size=world_size_for("study", ranks),
        seeds=seeds if seeds is not None else QUICK_SEEDS if quick else question.seeds,
        steps=steps if steps is not None else question.quick_steps if quick else question.steps,
        quick=quick,
        margin=margin,
    )
    # One seed has no interval.
    for name, value, least in (("seeds", settings.seeds, 2), ("steps", settings.steps, 1)):
        if value < least:
            raise InputError(f"{name} must be at least {least}, got {value}")
    # Higher seeds are used for tuning; more ranks would need more images than there are.
    for name, value, most in (
        ("seeds", settings.seeds, FIRST_TUNING_SEED),
        ("ranks", settings.world_size, MAX_RANKS),
    ):
        if value > most:
            raise InputError(f"{name} must be at most {most}, got {value}")
    if margin is not None and not 0 <= margin < inf:
        raise InputError(f"margin must be a number of at least 0, got {margin}")
    for package in question.needs:
        importlib.import_module(package)
    with torch_threads(1), ranks_for(settings.world_size, TIMEOUT_S, cpu=True) as on_ranks:
        return on_ranks(answer_on_rank, settings, command_line(), progress, keep=keep)


def answer_on_rank(ranks: Ranks, settings: StudySettings, command: str, progress: ProgressFactory) -> Study:
    """Runs the study of ``settings`` and returns the record, the same on every rank.

    Rank 0 passes a record to ``ranks.keep`` after each trial.

    Collective: all ranks.
    """
    started = time.perf_counter()
    question = STUDIES[settings.study]
    done: list[StudyRow] = []

    def record(rows: Sequence[StudyRow], notes: Mapping[str, str], findings: Sequence[str]) -> Study:
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

    def keep_rows(rows: Sequence[StudyRow]) -> None:
        done.extend(rows)
        ranks.keep(record(done, {}, ()))  # findings need all rows

    is_main = ranks.rank == 0
    with (progress if is_main else silent)(question.num_stages(settings)) as tell:
        outcome = question.run(settings, replace(ranks, keep=keep_rows if is_main else discard), tell)
    findings = question.find(outcome.rows, replace(question.rule, margin=settings.margin))
    study = record(outcome.rows, outcome.notes, findings)
    return ranks.share(study if ranks.rank == 0 else None)
