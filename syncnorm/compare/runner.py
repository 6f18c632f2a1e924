"""``run``: checks what is asked, finds or starts the ranks, and has them compare."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from difflib import get_close_matches

import torch

from syncnorm.compare.arms import ARMS, SINGLE
from syncnorm.compare.data import load_digits
from syncnorm.compare.progress import ProgressFactory, silent
from syncnorm.compare.ranks import initialised_ranks, launched_ranks, world_size_for
from syncnorm.compare.records import Comparison, Settings
from syncnorm.compare.session import compare_on_rank
from syncnorm.errors import InputError
from syncnorm.launcher import launched_world_size
from syncnorm.testing import run_ranks

DEFAULT_BATCH_PER_RANK = 4
# Three epochs at the default global batch of 8.
DEFAULT_STEPS = 504
DEFAULT_PARITY_STEPS = 10
LR = 0.02
MOMENTUM = 0.9
# Divides every width of the model: 16, 32, 64.
NUM_GROUPS = 8


def run(
    arms: Sequence[str] | None = None,
    *,
    ranks: int | None = None,
    batch_per_rank: int = DEFAULT_BATCH_PER_RANK,
    steps: int = DEFAULT_STEPS,
    parity_steps: int | None = None,
    seed: int = 0,
    progress: ProgressFactory = silent,
) -> Comparison:
    """Trains the arms one after the other, from the same weights on the same batches, and measures them.

    Under a launcher (``torchrun``, ``accelerate launch``) it uses the ranks that it was given; alone it
    starts gloo ranks on this machine.

    Args:
        arms: names out of `ARMS`; all of them by default. ``single`` is always run, and first: the others are
            measured against it.
        ranks: how many ranks to start; 2 by default. Under a launcher it must agree with the launcher's.
        batch_per_rank: images that each rank sees a step; ``single`` and ``dp`` see ``ranks`` times as many.
        steps: optimiser steps of each arm.
        parity_steps: the step after which parity is measured again; by default 10, or ``steps`` if less.
        seed: of the initial weights and of the order of the batches.
        progress: opened by rank 0, in its own process, to follow the run.

    Returns:
        The record, the same on every rank.

    Raises:
        InputError: an argument that cannot be used. Judged before anything starts, alike on every rank.

    Collective: under a launcher, all ranks.
    """
    settings = _settings(arms, ranks, batch_per_rank, steps, parity_steps, seed)
    command = " ".join(["syncnorm", *sys.argv[1:]])
    if launched_world_size() is None:
        return _start(settings, command, progress)
    with launched_ranks() as given:
        return compare_on_rank(settings, command, given, progress)


def _start(settings: Settings, command: str, progress: ProgressFactory) -> Comparison:
    # Only to end a run whose ranks hang: many times what a step takes, also on a machine that is busy.
    timeout = 120 + 0.25 * settings.steps * len(settings.arms) * settings.world_size
    results: list[Comparison] = run_ranks(
        _started_rank, settings.world_size, args=(settings, command, progress), timeout=timeout
    )
    return results[0]


def _started_rank(settings: Settings, command: str, progress: ProgressFactory) -> Comparison:
    with initialised_ranks(torch.device("cpu")) as ranks:
        return compare_on_rank(settings, command, ranks, progress)


def _settings(
    arms: Sequence[str] | None,
    ranks: int | None,
    batch_per_rank: int,
    steps: int,
    parity_steps: int | None,
    seed: int,
) -> Settings:
    for name, value, least in (("batch_per_rank", batch_per_rank, 1), ("steps", steps, 1), ("seed", seed, 0)):
        if value < least:
            raise InputError(f"{name} must be at least {least}, got {value}")
    if seed >= 2**63:
        raise InputError(f"seed must be less than 2**63, got {seed}")
    parity_steps = min(DEFAULT_PARITY_STEPS, steps) if parity_steps is None else parity_steps
    if not 1 <= parity_steps <= steps:
        raise InputError(f"parity_steps must be between 1 and steps ({steps}), got {parity_steps}")
    world_size = world_size_for("compare", ranks)
    global_batch, num_train = world_size * batch_per_rank, len(load_digits().train_y)
    if global_batch > num_train:
        raise InputError(
            f"{world_size} ranks of {batch_per_rank} images make a global batch of {global_batch}, "
            f"more than the {num_train} training images"
        )
    return Settings(
        arms=_arm_names(arms),
        world_size=world_size,
        batch_per_rank=batch_per_rank,
        steps=steps,
        parity_steps=parity_steps,
        seed=seed,
        lr=LR,
        momentum=MOMENTUM,
        num_groups=NUM_GROUPS,
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
