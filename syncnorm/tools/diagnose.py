"""A model trained under the monitor, for ``syncnorm diagnose``; and what the monitor costs it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import default_collate

from syncnorm.conversion.convert import convert
from syncnorm.errors import InputError
from syncnorm.monitor import monitor
from syncnorm.monitor.findings import Findings
from syncnorm.tools.common.ranks import Ranks, ranks_for, world_size_for

LR, MOMENTUM = 0.02, 0.9
WARMUP = 5
# Steps of a block, as many as between two samples; each way has one block in each repetition.
BLOCK = 50
WAYS = {"off": 0, "every 50": 50, "every 1": 1}


def _print(text: str) -> None:
    print(text, flush=True)


@dataclass(frozen=True)
class Task:
    """What to train, and how.

    Attributes:
        build: () -> the model.
        datasets: () -> (training data, test data), map-style, of (input, target); the second is not used.
        loss: (output, target) -> scalar.
        sync: convert the batch norms, or leave them as they are.
        batch_per_rank: samples that a rank sees a step.
        steps: of training.
        every: sampled.
        seed: of the weights and of the order of the data.
        repetitions: measure the overhead instead, with so many repetitions; 0 does not.
        say: prints the line of a sampled step, in the process of the first rank.
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
    say: Callable[[str], None] = _print


@dataclass(frozen=True)
class Overhead:
    """What the monitor costs: by way (off, every 50, every 1), of one rank's blocks in turns.

    Attributes:
        step_ms: median over the repetitions of a block's mean step.
        ratios: to the block with the monitor off in the same repetition, all of them.
    """

    step_ms: dict[str, float]
    ratios: dict[str, list[float]]


def diagnose(task: Task, ranks: int | None = None) -> Findings | Overhead:
    """Trains under the monitor, on ranks of its own or of a launcher; the first rank prints the sampled steps.

    Args:
        task: its functions are at the top level of modules.
        ranks: to start, over gloo on the CPU; 2 by default. Under a launcher, its own number.

    Raises:
        InputError: numbers that cannot be, before anything starts.

    Collective: under a launcher, all ranks.
    """
    for name in ("batch_per_rank", "steps", "every"):
        if getattr(task, name) < 1:
            raise InputError(f"{name} must be at least 1, got {getattr(task, name)}")
    if task.every > task.steps and not task.repetitions:
        raise InputError(f"every must be at most steps ({task.steps}), got {task.every}: no step would be sampled")
    world_size = world_size_for("diagnose", ranks)
    steps = max(task.steps, task.repetitions * BLOCK * len(WAYS))
    with ranks_for(world_size, 120 + steps * world_size) as on_ranks:
        return on_ranks(_diagnose_on_rank, task)


def _diagnose_on_rank(ranks: Ranks, task: Task) -> Findings | Overhead:
    torch.manual_seed(task.seed)
    model = task.build()
    model = (convert(model) if task.sync else model).to(ranks.device).train()
    ddp = DistributedDataParallel(model, device_ids=[ranks.device] if ranks.device.type == "cuda" else None)
    step = _Step(task, ddp, ranks)
    if task.repetitions:
        return _overhead(task, ddp, step, ranks)

    def log(text: str) -> None:
        if text.startswith("step "):  # the table is the command's to print
            task.say(text)

    with monitor(ddp, every=task.every, log=None if ranks.rank else log) as watch:
        for _ in range(task.steps):
            step()
    return watch.findings()


class _Step:
    """One step of SGD on this rank's part of the next global batch."""

    def __init__(self, task: Task, ddp: nn.Module, ranks: Ranks):
        self.task, self.ddp, self.ranks = task, ddp, ranks
        self.optimizer = torch.optim.SGD(ddp.parameters(), lr=LR, momentum=MOMENTUM)
        self.data = task.datasets()[0]
        batch = task.batch_per_rank * ranks.world_size
        if batch > len(self.data):
            raise InputError(f"a global batch of {batch} is more than the {len(self.data)} training samples")
        self.batches = _batches(len(self.data), batch, task.seed)

    def __call__(self) -> None:
        first = self.ranks.rank * self.task.batch_per_rank
        index = next(self.batches)[first : first + self.task.batch_per_rank]
        x, target = (part.to(self.ranks.device) for part in default_collate([tuple(self.data[i]) for i in index]))
        self.optimizer.zero_grad()
        torch.autograd.backward(self.task.loss(self.ddp(x), target))
        self.optimizer.step()


def _batches(num_samples: int, batch: int, seed: int) -> Iterator[list[int]]:
    """The same on all ranks: indices of a global batch, epoch after epoch in another order."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(num_samples, generator=generator).tolist()
        for start in range(0, num_samples - batch + 1, batch):
            yield order[start : start + batch]


def _overhead(task: Task, ddp: nn.Module, step: Callable[[], None], ranks: Ranks) -> Overhead:
    for _ in range(WARMUP):
        step()
    names = list(WAYS)
    blocks: dict[str, list[float]] = {name: [] for name in names}
    for repetition in range(task.repetitions):
        # Each way comes first, second and third equally often.
        for name in names[repetition % len(names) :] + names[: repetition % len(names)]:
            with monitor(ddp, every=WAYS[name], log=None):
                ranks.wait()
                began = time.perf_counter()
                for _ in range(BLOCK):
                    step()
                blocks[name].append((time.perf_counter() - began) / BLOCK)
    slowest = {
        name: [max(each) for each in zip(*ranks.collect(times), strict=True)] for name, times in blocks.items()
    }
    ratios = {n: [a / b for a, b in zip(times, slowest["off"], strict=True)] for n, times in slowest.items()}
    return Overhead({name: median(times) * 1e3 for name, times in slowest.items()}, ratios)
