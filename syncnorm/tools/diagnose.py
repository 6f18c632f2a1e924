"""Trains a model under the monitor, for ``syncnorm diagnose``, and measures what the monitor costs."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from syncnorm.conversion.convert import convert
from syncnorm.errors import InputError
from syncnorm.monitor import monitor
from syncnorm.monitor.findings import Findings
from syncnorm.tools.common.data import batch_indices, collate
from syncnorm.tools.common.ranks import Ranks, ranks_for, world_size_for

LR, MOMENTUM = 0.02, 0.9
# To measure the overhead: steps before the first block, and steps of a block, in which one step is sampled every 50.
WARMUP_STEPS = 5
BLOCK_STEPS = 50
# Setting of the monitor -> its interval in steps; 0 turns it off.
INTERVALS = {"off": 0, "every 50": 50, "every 1": 1}

_print_line = partial(print, flush=True)


@dataclass(frozen=True)
class TrainingRun:
    """What to train, and how.

    Attributes:
        build: () -> the model.
        datasets: () -> (training data, test data), map-style, of (input, target); the test data is not used.
        loss: (output, target) -> scalar.
        sync: convert the batch norms, or leave them as they are.
        batch_per_rank: number of samples per rank and step.
        steps: number of training steps.
        every: interval in steps at which the monitor samples.
        seed: of the weights and of the order of the data.
        repetitions: if not 0, measure the overhead of the monitor instead, with this many blocks per setting.
        print_line: prints the line of a sampled step, in the process of rank 0.
    """

    build: Callable[[], nn.Module]
    datasets: Callable[[], Any]
    loss: Callable[[Any, Any], Tensor] = F.cross_entropy
    sync: bool = True
    batch_per_rank: int = 4
    steps: int = 100
    every: int = 20
    seed: int = 0
    repetitions: int = 0
    print_line: Callable[[str], object] = _print_line


@dataclass(frozen=True)
class Overhead:
    """What the monitor costs, by its setting (off, every 50, every 1). Blocks of the settings alternate.

    Attributes:
        step_ms: the mean step of a block on the slowest rank, median over the repetitions.
        ratios: the same of every repetition, divided by that of the block with the monitor off.
    """

    step_ms: dict[str, float]
    ratios: dict[str, list[float]]


def diagnose(run: TrainingRun, ranks: int | None = None) -> Findings | Overhead:
    """Trains under the monitor, on ranks of this machine or of a launcher; rank 0 prints the sampled steps.

    Args:
        run: its functions must be at the top level of modules.
        ranks: number of ranks to start, over gloo on the CPU; 2 by default. Under a launcher, its number or None.

    Raises:
        InputError: a number is not possible. Nothing has been started.

    Collective: under a launcher, all ranks.
    """
    for name in ("batch_per_rank", "steps", "every"):
        if getattr(run, name) < 1:
            raise InputError(f"{name} must be at least 1, got {getattr(run, name)}")
    if run.every > run.steps and not run.repetitions:
        raise InputError(f"every must be at most steps ({run.steps}), got {run.every}: no step would be sampled")
    world_size = world_size_for("diagnose", ranks)
    steps = max(run.steps, run.repetitions * BLOCK_STEPS * len(INTERVALS))
    with ranks_for(world_size, 120 + steps * world_size) as on_ranks:
        return on_ranks(_diagnose_on_rank, run)


def _diagnose_on_rank(ranks: Ranks, run: TrainingRun) -> Findings | Overhead:
    torch.manual_seed(run.seed)
    model = run.build()
    model = (convert(model) if run.sync else model).to(ranks.device).train()
    ddp = DistributedDataParallel(model, device_ids=[ranks.device] if ranks.device.type == "cuda" else None)
    step = _Step(run, ddp, ranks)
    if run.repetitions:
        return _overhead(ddp, step, run.repetitions, ranks)

    def log(text: str) -> None:
        if text.startswith("step "):  # the command prints the table
            run.print_line(text)

    with monitor(ddp, every=run.every, log=None if ranks.rank else log) as watch:
        for _ in range(run.steps):
            step()
    return watch.findings()


class _Step:
    """One step of SGD on this rank's part of the next global batch."""

    def __init__(self, run: TrainingRun, ddp: nn.Module, ranks: Ranks):
        self.run, self.ddp, self.device = run, ddp, ranks.device
        self.optimizer = torch.optim.SGD(ddp.parameters(), lr=LR, momentum=MOMENTUM)
        self.data = run.datasets()[0]
        batch = run.batch_per_rank * ranks.world_size
        if batch > len(self.data):
            raise InputError(f"a global batch of {batch} is more than the {len(self.data)} training samples")
        self.indices = batch_indices(len(self.data), batch, run.seed)
        self.part = slice(ranks.rank * run.batch_per_rank, (ranks.rank + 1) * run.batch_per_rank)

    def __call__(self) -> None:
        items = [self.data[index] for index in next(self.indices)[self.part].tolist()]
        x, target = (part.to(self.device) for part in collate(items))
        self.optimizer.zero_grad()
        torch.autograd.backward(self.run.loss(self.ddp(x), target))
        self.optimizer.step()


def _overhead(ddp: nn.Module, step: Callable[[], None], repetitions: int, ranks: Ranks) -> Overhead:
    for _ in range(WARMUP_STEPS):
        step()
    names = list(INTERVALS)
    blocks: dict[str, list[float]] = {name: [] for name in names}
    for repetition in range(repetitions):
        # Each setting is first, second and third equally often.
        for name in names[repetition % len(names) :] + names[: repetition % len(names)]:
            with monitor(ddp, every=INTERVALS[name], log=None):
                ranks.wait()
                began = time.perf_counter()
                for _ in range(BLOCK_STEPS):
                    step()
                blocks[name].append((time.perf_counter() - began) / BLOCK_STEPS)
    slowest = {
        name: [max(each) for each in zip(*ranks.collect(times), strict=True)] for name, times in blocks.items()
    }
    ratios = {n: [a / b for a, b in zip(times, slowest["off"], strict=True)] for n, times in slowest.items()}
    return Overhead({name: median(times) * 1e3 for name, times in slowest.items()}, ratios)
