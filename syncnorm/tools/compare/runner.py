"""``run`` and ``sweep``: check the arguments, find or start the ranks, and run every arm on them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from syncnorm.errors import InputError
from syncnorm.testing.pool import RankError
from syncnorm.tools.common.provenance import command_line, provenance
from syncnorm.tools.common.ranks import WAIT, Keep, Ranks, discard, ranks_for, world_size_for
from syncnorm.tools.compare.arm_runner import ArmProgressFactory, ArmRunner, no_progress
from syncnorm.tools.compare.arms import DEFAULT_ARMS, SINGLE, arm_named
from syncnorm.tools.compare.checks import check_problem
from syncnorm.tools.compare.metrics import Metric
from syncnorm.tools.compare.paired import SYNCED, decisions
from syncnorm.tools.compare.problem import Loss, Problem
from syncnorm.tools.compare.records import CompareSettings, Comparison, Task
from syncnorm.tools.compare.seeds import run_seeds
from syncnorm.tools.compare.steps import Step
from syncnorm.tools.compare.verdict import verdict

if TYPE_CHECKING:
    from accelerate import Accelerator

# Few samples per rank, as in detection and segmentation, where the statistics of a rank are poor.
DEFAULT_BATCH_PER_RANK = 2
DEFAULT_STEPS = 250
DEFAULT_PARITY_STEPS = 10
DEFAULT_LR = 0.02
MOMENTUM = 0.9
DEFAULT_SEEDS = 3
DEFAULT_BUDGET_SECONDS = 600.0
AMP = ("bfloat16", "float16")


def run(
    build_model: Callable[[], nn.Module] | None = None,
    datasets: Callable[[], Any] | None = None,
    loss: Loss | None = None,
    *,
    step: Step | None = None,
    collate: Callable[[list[Any]], Any] | None = None,
    metric: str | Metric | Callable[..., Any] | None = None,
    optimizer: Callable[[nn.Module], Any] | None = None,
    arms: Sequence[str] | None = None,
    ranks: int | None = None,
    batch_per_rank: int = DEFAULT_BATCH_PER_RANK,
    steps: int = DEFAULT_STEPS,
    parity_steps: int | None = None,
    seed: int = 0,
    seeds: int | Literal["auto"] = DEFAULT_SEEDS,
    budget: float = DEFAULT_BUDGET_SECONDS,
    margin: float | None = None,
    lr: float = DEFAULT_LR,
    eval_batch: int | None = None,
    accumulate: int = 1,
    num_workers: int = 0,
    amp: str = "",
    progress: ArmProgressFactory = no_progress,
) -> Comparison:
    """Trains the arms in turn, from the same weights on the same batches, and measures them.

    Under a launcher (``torchrun``, ``accelerate launch``) it runs on the launched ranks. Otherwise it starts gloo
    ranks on this machine, which import the functions by their names: a script needs ``if __name__ == "__main__":``
    around the call.

    Args:
        build_model: () -> the model, with its batch norms and initial weights; the random generators are seeded
            before the call. A small CNN for the digits by default.
        datasets: () -> (training data, test data), map-style, of ``(input, target)``; scikit-learn's digits by
            default. It must return the same on every rank; the random generators are seeded before the call.
        loss: (output, target) -> scalar, the mean over the samples; cross-entropy by default.
        step: (model, batch) -> loss, in place of ``loss``: a scalar tensor, the mean over the samples; a dict of
            losses, which are added up; or an output with ``loss``. The items of the data may then be anything that
            ``collate`` can make a batch of. With a third parameter, ``optimizers``, the step calls ``backward`` and
            the optimizers itself, and returns a number to record.
        collate: list of items -> batch; torch's ``default_collate`` by default.
        metric: by which the arms are judged: ``"accuracy"``, ``"loss"``, ``"miou"`` or ``"map"``, a `Metric`, or a
            function or class as in `Metric.measure` with an attribute ``higher_is_better`` and, optionally, ``name``
            and ``share``. By default accuracy if the targets are classes, else the loss.
        optimizer: model -> its optimizer, or several in a list, tuple or dict; SGD with momentum 0.9 by default. Each
            initial learning rate falls to zero with a cosine schedule.
        arms: names of `ARMS`, or those of `arm_named`; `DEFAULT_ARMS` by default. ``single`` always runs, first,
            because the others are compared with it.
        ranks: number of ranks to start; 2 by default. Under a launcher it must equal the launcher's.
        batch_per_rank: samples per rank and step; ``single`` and ``dp`` have the global batch, ``ranks`` times as
            many.
        steps: optimizer steps of each arm and seed.
        parity_steps: parity is measured at a few steps up to this one; 10 by default, or ``steps`` if that is less.
        seed: the first seed, of the initial weights and of the order of the batches.
        seeds: number of consecutive seeds, at least two for a decision; ``"auto"`` adds seeds until the results
            decide or the budget is used up.
        budget: seconds of training, for ``seeds="auto"``.
        margin: the largest difference that does not matter: in percentage points for a metric between 0 and 1 (0.5 by
            default), in percent of the other arm's result for other metrics (2 by default).
        lr: initial learning rate of the default optimizer.
        eval_batch: test samples per forward; ``batch_per_rank`` by default.
        accumulate: batches per optimizer step, whose gradients are averaged.
        num_workers: processes that load the training data of each rank; 0 loads it in the rank.
        amp: ``"bfloat16"`` or ``"float16"``: training and tests run under ``torch.autocast``, float16 with loss
            scaling. Parity is measured in full precision.
        progress: called on rank 0, in its process, to report the progress of the run.

    Returns:
        The record, the same on every rank.

    Raises:
        InputError: an argument that cannot be used; raised before anything is started, on every rank.

    Collective: under a launcher, all ranks.
    """
    settings = make_settings(
        arms=arms,
        ranks=ranks,
        batch_per_rank=batch_per_rank,
        steps=steps,
        parity_steps=parity_steps,
        seed=seed,
        seeds=seeds,
        budget=budget,
        margin=margin,
        lr=lr,
        eval_batch=eval_batch,
        accumulate=accumulate,
        num_workers=num_workers,
        amp=amp,
    )
    problem = Problem.of(build_model, datasets, loss, step=step, collate=collate, metric=metric, optimizer=optimizer)
    (comparison,) = sweep(problem, [settings], progress)
    return comparison


def make_settings(
    *,
    arms: Sequence[str] | None = None,
    ranks: int | None = None,
    batch_per_rank: int = DEFAULT_BATCH_PER_RANK,
    steps: int = DEFAULT_STEPS,
    parity_steps: int | None = None,
    seed: int = 0,
    seeds: int | Literal["auto"] = DEFAULT_SEEDS,
    budget: float = DEFAULT_BUDGET_SECONDS,
    margin: float | None = None,
    lr: float = DEFAULT_LR,
    eval_batch: int | None = None,
    accumulate: int = 1,
    num_workers: int = 0,
    amp: str = "",
) -> CompareSettings:
    """The settings for the arguments of `run`; `sweep` determines ``num_groups`` from the model.

    Raises:
        InputError: an argument is out of range.
    """
    first_seeds = 1 if seeds == "auto" else seeds
    eval_batch = batch_per_rank if eval_batch is None else eval_batch
    minima = (
        ("batch_per_rank", batch_per_rank, 1),
        ("steps", steps, 1),
        ("seed", seed, 0),
        ("seeds", first_seeds, 1),
        ("eval_batch", eval_batch, 1),
        ("accumulate", accumulate, 1),
        ("num_workers", num_workers, 0),
    )
    for name, value, minimum in minima:
        if value < minimum:
            raise InputError(f"{name} must be at least {minimum}, got {value}")
    if seed + first_seeds > 2**62:
        raise InputError(f"seed must be less than 2**62, got {seed}")
    for name, positive in (("lr", lr), ("budget", budget), ("margin", 1.0 if margin is None else margin)):
        if not 0 < positive < math.inf:
            raise InputError(f"{name} must be a positive number, got {positive}")
    if amp not in ("", *AMP):
        raise InputError(f"amp must be {' or '.join(AMP)}, got {amp!r}")
    parity_steps = min(DEFAULT_PARITY_STEPS, steps) if parity_steps is None else parity_steps
    if not 1 <= parity_steps <= steps:
        raise InputError(f"parity_steps must be between 1 and steps ({steps}), got {parity_steps}")
    return CompareSettings(
        arms=_arm_names(arms),
        world_size=world_size_for("compare", ranks),
        batch_per_rank=batch_per_rank,
        steps=steps,
        parity_steps=parity_steps,
        seeds=tuple(range(seed, seed + first_seeds)),
        lr=lr,
        momentum=MOMENTUM,
        num_groups=1,
        margin=margin,
        budget_seconds=budget if seeds == "auto" else None,
        accumulate=accumulate,
        eval_batch=eval_batch,
        num_workers=num_workers,
        amp=amp,
    )


def _arm_names(names: Sequence[str] | None) -> tuple[str, ...]:
    if names is None:
        return DEFAULT_ARMS
    for name in names:
        arm_named(name)
    # The reference comes first; an arm that is named twice runs once.
    return tuple(dict.fromkeys((SINGLE.name, *names)))


def sweep(
    problem: Problem,
    settings: Sequence[CompareSettings],
    progress: ArmProgressFactory = no_progress,
    keep: Keep = discard,
) -> Iterator[Comparison]:
    """A comparison for each of ``settings``, which have the same world size, as soon as it is complete.

    Args:
        problem: what to train.
        settings: of each comparison.
        progress: see `run`.
        keep: called in the process of rank 0 with a record of the seeds that are done, at the latest before an error
            is raised.

    Raises:
        InputError: the problem does not fit one of the settings; raised before anything is started.

    Collective: as `run`.
    """
    with torch.random.fork_rng(devices=[]):  # each item of the trial is drawn under a seed of its own
        checked = [(each, *check_problem(problem, each)) for each in settings]
    with ranks_for(settings[0].world_size, WAIT.total_seconds()) as on_ranks:
        for each, found, task, num_groups in checked:
            complete = replace(each, num_groups=num_groups)
            try:
                comparison = on_ranks(compare_on_rank, found, task, complete, command_line(), progress, keep=keep)
            except RankError as error:
                if isinstance(error.__cause__, InputError):
                    raise error.__cause__ from error
                raise
            yield comparison


def compare_on_rank(
    ranks: Ranks,
    problem: Problem,
    task: Task,
    settings: CompareSettings,
    command: str,
    open_progress: ArmProgressFactory,
) -> Comparison:
    """Trains and measures every arm of ``settings``; the same record on every rank.

    Rank 0 passes a record to ``ranks.keep`` after each seed.

    Collective: all ranks.
    """
    started = time.perf_counter()
    # Imports of the user's data can take seconds, which must not count as the first arm's time.
    datasets = problem.datasets()
    _check_sizes(problem.data_name, [len(each) for each in datasets], ranks)
    with _accelerator(ranks) as accelerator:
        # The same applies to the first optimizer, the first DDP and the first collectives.
        with no_progress(1) as progress:
            short = replace(settings, arms=(SYNCED,), steps=1, parity_steps=1)
            ArmRunner(problem, task, datasets, short, ranks, accelerator, progress).train(settings.seeds[0])
        num_runs = None if settings.budget_seconds else len(settings.arms) * len(settings.seeds)
        with (open_progress if ranks.rank == 0 else no_progress)(num_runs) as progress:
            runner = ArmRunner(problem, task, datasets, settings, ranks, accelerator, progress)

            def record(seeds: Sequence[int], looks: int) -> Comparison:
                comparison = Comparison(
                    settings=replace(settings, seeds=tuple(seeds)),
                    task=task,
                    **provenance(ranks.hardware()),
                    command=command,
                    arms=tuple(runner.results.values()),
                    spread=runner.divergence,
                    wall_seconds=time.perf_counter() - started,
                    looks=looks,
                )
                return replace(comparison, decisions=decisions(comparison), verdict=tuple(verdict(comparison)))

            seeds, looks = run_seeds(runner.train, record, settings, ranks)
            runner.time_steps()
    return ranks.share(record(seeds, looks) if ranks.rank == 0 else None)


def _check_sizes(name: str, sizes: list[int], ranks: Ranks) -> None:
    """Raises an `InputError` on every rank if the ranks would take their samples from different data."""
    by_rank = ranks.collect(sizes)
    other = next((rank for rank, each in enumerate(by_rank) if each != by_rank[0]), None)
    if other is not None:
        raise InputError(
            f"{name}() returns {' and '.join(map(str, by_rank[0]))} samples on rank 0, but "
            f"{' and '.join(map(str, by_rank[other]))} on rank {other}: it must return the same on every rank, and "
            f"syncnorm gives each rank its part"
        )


@contextmanager
def _accelerator(ranks: Ranks) -> Iterator[Accelerator]:
    """Accelerate on the existing process group; its state is reset at the end, as a rank may get another group."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState

    created_here = not PartialState._shared_state
    try:
        # Full precision, whatever the launcher is configured for, because arms are compared to fp32 rounding.
        yield Accelerator(cpu=ranks.device.type != "cuda", mixed_precision="no")
    finally:
        AcceleratorState._reset_state(reset_partial_state=created_here)
