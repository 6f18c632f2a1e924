"""The training loop that every arm goes through, on the ranks that take part in it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from syncnorm.compare.data import Digits, batch_indices
from syncnorm.compare.evidence import CollectiveCount
from syncnorm.compare.measure import CollectiveRecorder, Snapshot, snapshot, synchronize
from syncnorm.compare.progress import Progress
from syncnorm.compare.records import Settings


@dataclass(frozen=True)
class Part:
    """Which part of each global batch a rank trains on: images ``start`` to ``stop``, on ``device``."""

    start: int
    stop: int
    device: torch.device


@dataclass(frozen=True)
class Trained:
    """What the loop leaves behind: snapshots by step number, and each step's time."""

    snapshots: dict[int, Snapshot]
    step_seconds: list[float]


class Trainer:
    """SGD with momentum and a cosine schedule over this rank's part of the common batches.

    The loss is the mean over the rank's images. DDP averages gradients over ranks, so with equal parts the
    gradient is that of the mean over the global batch, which is what one process with the whole batch has.
    """

    def __init__(self, module: nn.Module, plain: nn.Module, digits: Digits, settings: Settings, part: Part) -> None:
        self.module, self.plain, self.settings, self.part = module, plain, settings, part
        self.x, self.y = digits.train_x.to(part.device), digits.train_y.to(part.device)
        self.optimizer = torch.optim.SGD(plain.parameters(), lr=settings.lr, momentum=settings.momentum)
        self.batches: Iterator[Tensor] = batch_indices(len(self.y), settings.global_batch, settings.seed)

    def train(self, progress: Progress) -> Trained:
        """Runs ``settings.steps`` steps.

        Collective: what the wrapper and the norm layers issue; every rank of the arm must call.
        """
        settings, snapshots, step_seconds = self.settings, {}, []
        self.module.train()
        for step in range(1, settings.steps + 1):
            for group in self.optimizer.param_groups:
                group["lr"] = settings.lr * 0.5 * (1 + math.cos(math.pi * (step - 1) / settings.steps))
            step_seconds.append(self._timed_step())
            if step in (1, settings.parity_steps):
                snapshots[step] = snapshot(self.plain)
            progress.step()
        return Trained(snapshots, step_seconds)

    def count_collectives(self) -> tuple[CollectiveCount, ...]:
        """What one more step sends. It changes the model, so evaluate first.

        Collective: as `train`, two steps.
        """
        self.module.train()
        recorder = CollectiveRecorder()
        # DDP rebuilds its buckets in the step after the very first, with a broadcast of its own: do not count
        # that one.
        for context in (nullcontext(), recorder):
            with context:
                self._timed_step()
        return recorder.counts()

    def _timed_step(self) -> float:
        index = next(self.batches)[self.part.start : self.part.stop]
        x, y = self.x[index], self.y[index]
        synchronize(self.part.device)
        started = time.perf_counter()
        self.optimizer.zero_grad()
        torch.autograd.backward(F.cross_entropy(self.module(x), y))
        self.optimizer.step()
        synchronize(self.part.device)
        return time.perf_counter() - started


@torch.no_grad()
def accuracy(model: nn.Module, digits: Digits, device: torch.device) -> float:
    """Share of the test images that ``model`` classifies right, in eval mode, without communication."""
    model.eval()
    predicted = model(digits.test_x.to(device)).argmax(dim=1).cpu()
    return float((predicted == digits.test_y).double().mean())
