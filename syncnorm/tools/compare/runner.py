"""``run``: checks what is asked, finds or starts the ranks, and has them compare."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

from torch import nn

from syncnorm.errors import InputError
from syncnorm.testing.pool import RankError
from syncnorm.tools.common.provenance import command_line
from syncnorm.tools.common.ranks import WAIT, OnRanks, ranks_for, world_size_for
from syncnorm.tools.compare.arms import ARMS, SINGLE
from syncnorm.tools.compare.examination import examine
from syncnorm.tools.compare.problem import Loss, Problem, problem
from syncnorm.tools.compare.progress import ProgressFactory, silent
from syncnorm.tools.compare.records import Comparison, Settings, Task
from syncnorm.tools.compare.session import compare_on_rank

DEFAULT_BATCH_PER_RANK = 4
# Three epochs of the digits at the default global batch of 8.
DEFAULT_STEPS = 504
DEFAULT_PARITY_STEPS = 10
DEFAULT_LR = 0.02
MOMENTUM = 0.9


def run(
    build_model: Callable[[], nn.Module] | None = None,
    datasets: Callable[[], Any] | None = None,
    loss: Loss | None = None,
    *,
    arms: Sequence[str] | None = None,
    ranks: int | None = None,
    batch_per_rank: int = DEFAULT_BATCH_PER_RANK,
    steps: int = DEFAULT_STEPS,
    parity_steps: int | None = None,
    seed: int = 0,
    seeds: int = 1,
    lr: float = DEFAULT_LR,
    progress: ProgressFactory = silent,
) -> Comparison:
    """Trains the arms one after the other, from the same weights on the same batches, and measures them.

    Under a launcher (``torchrun``, ``accelerate launch``) it uses the ranks that it was given; alone it
    starts gloo ranks on this machine, which import the functions by their names.

    Args:
        build_model: () -> the model, with its batch norms and as training begins with it; seeded before it is
            called. A residual network for the digits by default.
        datasets: () -> (training data, test data), map-style, of ``(input, target)``; scikit-learn's digits by
            default. The same on every rank, which is why it is seeded too.
        loss: (output, target) -> scalar, the mean over the samples; cross-entropy by default.
        arms: names out of `ARMS`; all of them by default. ``single`` is always run, and first: the others are
            measured against it.
        ranks: how many ranks to start; 2 by default. Under a launcher it must agree with the launcher's.
        batch_per_rank: samples that each rank sees a step; ``single`` and ``dp`` see ``ranks`` times as many.
        steps: optimiser steps of each arm and seed.
        parity_steps: parity is measured in a few steps up to this one; by default 10, or ``steps`` if less.
        seed: the first; of the initial weights and of the order of the batches.
        seeds: how many, each one more than the one before. A verdict on accuracy needs at least two.
        lr: of SGD with momentum 0.9, which falls to zero along a cosine.
        progress: opened by rank 0, in its own process, to follow the run.

    Returns:
        The record, the same on every rank.

    Raises:
        InputError: an argument that cannot be used. Judged before anything starts, alike on every rank.

    Collective: under a launcher, all ranks.
    """
    sizes = [batch_per_rank]
    (found,) = sweep(sizes, build_model, datasets, loss, arms, ranks, steps, parity_steps, seed, seeds, lr, progress)
    return found


def sweep(
    sizes: Sequence[int],
    build_model: Callable[[], nn.Module] | None = None,
    datasets: Callable[[], Any] | None = None,
    loss: Loss | None = None,
    arms: Sequence[str] | None = None,
    ranks: int | None = None,
    steps: int = DEFAULT_STEPS,
    parity_steps: int | None = None,
    seed: int = 0,
    seeds: int = 1,
    lr: float = DEFAULT_LR,
    progress: ProgressFactory = silent,
) -> Iterator[Comparison]:
    """A comparison for each of ``sizes``, samples of a rank's step, as soon as it is made; the rest as in `run`.

    Raises:
        InputError: as `run`, for whichever size, before anything is started.

    Collective: as `run`.
    """
    asked = problem(build_model, datasets, loss)
    planned = []
    for size in sizes:
        settings = _settings(arms, ranks, size, steps, parity_steps, seed, seeds, lr)
        task, num_groups = examine(asked, settings.world_size, size, seed)
        planned.append((asked, task, replace(settings, num_groups=num_groups)))
    with ranks_for(world_size_for("compare", ranks), WAIT.total_seconds()) as on_ranks:
        for each in planned:
            yield _compare(on_ranks, *each, command_line(), progress)


def _compare(
    on_ranks: OnRanks, asked: Problem, task: Task, settings: Settings, command: str, progress: ProgressFactory
) -> Comparison:
    try:
        return on_ranks(compare_on_rank, asked, task, settings, command, progress)
    except RankError as error:
        if isinstance(error.__cause__, InputError):
            raise error.__cause__ from error
        raise


def _settings(
    arms: Sequence[str] | None,
    ranks: int | None,
    batch_per_rank: int,
    steps: int,
    parity_steps: int | None,
    seed: int,
    seeds: int,
    lr: float,
) -> Settings:
    least_of = (("batch_per_rank", batch_per_rank, 1), ("steps", steps, 1), ("seed", seed, 0), ("seeds", seeds, 1))
    for name, value, least in least_of:
        if value < least:
            raise InputError(f"{name} must be at least {least}, got {value}")
    if seed + seeds > 2**62:
        raise InputError(f"seed must be less than 2**62, got {seed}")
    if not 0 < lr < math.inf:
        raise InputError(f"lr must be a positive number, got {lr}")
    parity_steps = min(DEFAULT_PARITY_STEPS, steps) if parity_steps is None else parity_steps
    if not 1 <= parity_steps <= steps:
        raise InputError(f"parity_steps must be between 1 and steps ({steps}), got {parity_steps}")
    return Settings(
        arms=_arm_names(arms),
        world_size=world_size_for("compare", ranks),
        batch_per_rank=batch_per_rank,
        steps=steps,
        parity_steps=parity_steps,
        seeds=tuple(range(seed, seed + seeds)),
        lr=lr,
        momentum=MOMENTUM,
        num_groups=1,
    )


def _arm_names(names: Sequence[str] | None) -> tuple[str, ...]:
    if names is None:
        return tuple(ARMS)
    for name in names:
        if name not in ARMS:
            near = get_close_matches(name, ARMS, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}? " if near else ""
            raise InputError(f"no arm is called {name!r}: {hint}the arms are {', '.join(ARMS)}")
    # The reference comes first; an arm that is named twice runs once.
    return tuple(dict.fromkeys((SINGLE.name, *names)))
