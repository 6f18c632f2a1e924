"""The training loop that every arm goes through, on the ranks that take part in it."""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from syncnorm.tools.common.data import Batches, in_order, seed_everything
from syncnorm.tools.common.timing import synchronize
from syncnorm.tools.compare.evidence import CollectiveCount, Point
from syncnorm.tools.compare.measure import CollectiveRecorder
from syncnorm.tools.compare.parity import Recorder, Snapshot, WithoutDropout, steps_to_measure
from syncnorm.tools.compare.problem import Loss
from syncnorm.tools.compare.waiting import StepTimes

if TYPE_CHECKING:
    from accelerate import Accelerator

EVALUATION_BATCH = 256


@dataclass(frozen=True)
class Part:
    """Which part of each global batch a rank trains on, and which other ranks have one."""

    samples: slice
    rank: int
    device: torch.device


class Trainer:
    """SGD with momentum and a cosine schedule over this rank's part of the common batches.

    The loss is the mean over the rank's samples. DDP averages gradients over ranks, so with equal parts the
    gradient is that of the mean over the global batch, which is what one process with the whole batch has.

    Args:
        module: what is called: ``plain``, or DDP around it.
        plain: the model.
        loss: (output, target) -> scalar.
        batches: this rank's part of each.
        part: of the batches.
        lr: of the first step; it falls to zero in ``steps`` steps.
        momentum: of SGD.
        steps: of the training.
        accelerator: its backward is called, and its optimiser, where the arm uses all ranks.
    """

    def __init__(
        self,
        module: nn.Module,
        plain: nn.Module,
        loss: Loss,
        batches: Batches,
        part: Part,
        seed: int,
        lr: float,
        momentum: float,
        steps: int,
        accelerator: Accelerator,
    ) -> None:
        self.module, self.plain, self.loss, self.batches, self.part = module, plain, loss, batches, part
        self.lr, self.steps, self.seed, self.accelerator = lr, steps, seed, accelerator
        optimizer = torch.optim.SGD(plain.parameters(), lr=lr, momentum=momentum)
        self.optimizer: Any = accelerator.prepare(optimizer) if module is not plain else optimizer
        self.losses: list[Tensor] = []
        self.done = 0

    def step(self, recorder: Recorder | None = None) -> StepTimes:
        """One step; ``recorder`` sees the gradients before the update.

        Collective: what the wrapper and the norm layers issue; every rank of the arm must call.
        """
        self.module.train()
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, self.done / self.steps)))
        inputs, targets = to_device(self.batches.next(), self.part.device)
        seed_everything(self.seed + 1000 * self.done + self.part.rank)  # dropout's: another on each rank
        self.done += 1
        synchronize(self.part.device)
        started = time.perf_counter()
        self.optimizer.zero_grad()
        loss = self.loss(self.module(inputs), targets)
        self.accelerator.backward(loss)
        backward_done = time.perf_counter()
        if recorder:
            recorder.keep_gradients()
        self.optimizer.step()
        synchronize(self.part.device)
        self.losses.append(loss.detach())
        return StepTimes(time.perf_counter() - started, backward_done)

    def record(self, steps: int, recorder: Recorder | None) -> dict[int, Snapshot]:
        """Snapshots of a few of ``steps`` steps without dropout; none without a recorder.

        Collective: as `step`.
        """
        snapshots = {}
        wanted = steps_to_measure(steps)
        for step in range(1, steps + 1):
            watched = recorder if step in wanted else None
            context: AbstractContextManager[None] = watched.recording() if watched else nullcontext()
            with WithoutDropout(), context:
                self.step(watched)
            if watched:
                snapshots[step] = watched.snapshot()
        return snapshots

    def count_collectives(self) -> tuple[CollectiveCount, ...]:
        """What one more step sends. It changes the model, so evaluate first.

        Collective: as `step`, twice.
        """
        recorder = CollectiveRecorder()
        # DDP rebuilds its buckets in the step after the very first, with a broadcast of its own: do not count
        # that one.
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

    Accuracy is ``None`` where the metric is the loss; either is where it is not finite.
    """
    model.eval()
    right = judged = total = samples = 0.0
    for count, batch in in_order(data, EVALUATION_BATCH):
        inputs, targets = to_device(batch, device)
        outputs = model(inputs)
        total += float(loss(outputs, targets)) * count
        samples += count
        if metric == "accuracy":
            right += float((outputs.argmax(dim=1) == targets).sum())
            # Others are those that a loss leaves out: cross-entropy's -100, or the 255 of an unlabelled pixel.
            judged += float(((targets >= 0) & (targets < outputs.shape[1])).sum())
    mean = total / samples
    return right / judged if judged else None, mean if math.isfinite(mean) else None


def curve(losses: list[float], most: int = 50) -> tuple[Point, ...]:
    """The mean of each of up to ``most`` stretches of steps, at the last step of each."""
    ends = sorted({round(len(losses) * (i + 1) / most) for i in range(most)} - {0})
    points = []
    for start, end in pairwise((0, *ends)):
        value = sum(losses[start:end]) / (end - start)
        points.append(Point(end, value if math.isfinite(value) else None))
    return tuple(points)
