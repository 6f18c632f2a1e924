"""The training loop of all arms, on the ranks that take part in an arm."""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from syncnorm.tools.common.data import Batches, in_order, seed_everything
from syncnorm.tools.common.ranks import Ranks
from syncnorm.tools.common.timing import synchronize
from syncnorm.tools.compare.measurements import CollectiveRecorder, StepTimes
from syncnorm.tools.compare.parity import Recorder, Snapshot, WithoutDropout, steps_to_measure
from syncnorm.tools.compare.problem import Loss
from syncnorm.tools.compare.records import CollectiveCount, CompareSettings, Point

if TYPE_CHECKING:
    from accelerate import Accelerator

EVALUATION_BATCH = 256


@dataclass
class Trainer:
    """SGD with momentum and a cosine schedule over this rank's part of the common batches.

    The loss is the mean over the rank's samples. DDP averages gradients over ranks, so with equal parts the
    gradient is that of the mean over the global batch, as in one process with the whole batch.

    Attributes:
        wrapper: the module that is called: ``model``, or data parallelism around it.
        loss: (output, target) -> scalar.
        batches: this rank's part of each global batch.
        settings: ``lr``, ``momentum`` and ``steps`` are used; the learning rate falls to zero in ``steps`` steps.
        accelerator: runs the backward, and the optimizer of a wrapped model.
    """

    wrapper: nn.Module
    model: nn.Module
    loss: Loss
    batches: Batches
    seed: int
    settings: CompareSettings
    ranks: Ranks
    accelerator: Accelerator
    optimizer: Any = field(init=False)
    losses: list[Tensor] = field(default_factory=list)
    steps_done: int = 0

    def __post_init__(self) -> None:
        """Creates the optimizer."""
        settings = self.settings
        optimizer = torch.optim.SGD(self.model.parameters(), lr=settings.lr, momentum=settings.momentum)
        self.optimizer = optimizer if self.wrapper is self.model else self.accelerator.prepare(optimizer)

    def step(self, recorder: Recorder | None = None) -> StepTimes:
        """One step; ``recorder`` copies the gradients before the update.

        Collective: those of the wrapper and the norm layers; every rank of the arm must call.
        """
        device, progress = self.ranks.device, min(1.0, self.steps_done / self.settings.steps)
        self.wrapper.train()
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.lr * 0.5 * (1 + math.cos(math.pi * progress))
        inputs, targets = to_device(self.batches.next(), device)
        # For dropout, which differs between ranks.
        seed_everything(self.seed + 1000 * self.steps_done + self.ranks.rank)
        self.steps_done += 1
        synchronize(device)
        started = time.perf_counter()
        self.optimizer.zero_grad()
        loss = self.loss(self.wrapper(inputs), targets)
        self.accelerator.backward(loss)
        backward_done = time.perf_counter()
        if recorder:
            recorder.record_gradients()
        self.optimizer.step()
        synchronize(device)
        self.losses.append(loss.detach())
        return StepTimes(time.perf_counter() - started, backward_done)

    def record(self, steps: int, recorder: Recorder | None) -> dict[int, Snapshot]:
        """Trains ``steps`` steps without dropout, and returns snapshots of some of them; none without a recorder.

        Collective: as `step`.
        """
        snapshots = {}
        recorded_steps = steps_to_measure(steps)
        for step in range(1, steps + 1):
            active = recorder if step in recorded_steps else None
            context: AbstractContextManager[None] = active.recording() if active else nullcontext()
            with WithoutDropout(), context:
                self.step(active)
            if active:
                snapshots[step] = active.snapshot()
        return snapshots

    def count_collectives(self) -> tuple[CollectiveCount, ...]:
        """The collectives of one more step. It changes the model, so evaluate before.

        Collective: as `step`, twice.
        """
        recorder = CollectiveRecorder()
        # DDP rebuilds its buckets in its second step, with an additional broadcast, which must not be counted.
        for context in (nullcontext(), recorder):
            with context:
                self.step()
        return recorder.counts()


def to_device(batch: Any, device: torch.device) -> Any:
    """A collated batch, whose targets may be nested, on ``device``."""
    from accelerate.utils import send_to_device

    return send_to_device(batch, device)


@torch.no_grad()
def evaluate(
    model: nn.Module, loss: Loss, data: Any, metric: str, device: torch.device
) -> tuple[float | None, float | None]:
    """(accuracy, mean loss) of ``model`` on ``data``, in eval mode, without communication.

    Accuracy is ``None`` if ``metric`` is the loss; either is ``None`` if it is not finite.
    """
    model.eval()
    correct = num_targets = total = samples = 0.0
    for count, batch in in_order(data, EVALUATION_BATCH):
        inputs, targets = to_device(batch, device)
        outputs = model(inputs)
        total += float(loss(outputs, targets)) * count
        samples += count
        if metric == "accuracy":
            correct += float((outputs.argmax(dim=1) == targets).sum())
            # Other targets are ignored by the loss: -100 in cross-entropy, or 255 for an unlabeled pixel.
            num_targets += float(((targets >= 0) & (targets < outputs.shape[1])).sum())
    mean = total / samples
    return correct / num_targets if num_targets else None, mean if math.isfinite(mean) else None


def curve(losses: list[float], max_points: int = 50) -> tuple[Point, ...]:
    """Splits the steps into up to ``max_points`` intervals: the mean of each, at its last step."""
    ends = sorted({round(len(losses) * (i + 1) / max_points) for i in range(max_points)} - {0})
    points = []
    for start, end in pairwise((0, *ends)):
        value = sum(losses[start:end]) / (end - start)
        points.append(Point(end, value if math.isfinite(value) else None))
    return tuple(points)
