"""The training loop of all arms, on the ranks that take part in an arm."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from syncnorm.tools.common.data import Batches, seed_everything, to_device
from syncnorm.tools.common.ranks import Ranks
from syncnorm.tools.common.timing import synchronize
from syncnorm.tools.compare.arms import Arm
from syncnorm.tools.compare.evaluation import autocast
from syncnorm.tools.compare.measurements import CollectiveRecorder, StepTimes
from syncnorm.tools.compare.parity import Recorder, Snapshot, WithoutDropout, steps_to_measure
from syncnorm.tools.compare.problem import Problem
from syncnorm.tools.compare.records import CollectiveCount, CompareSettings, Point
from syncnorm.tools.compare.steps import WholeStep, as_loss, list_of
from syncnorm.training import whole_batch


@dataclass
class Trainer:
    """The user's optimizer with a cosine schedule, over this rank's part of the common batches.

    The loss is the mean over the rank's samples. DDP averages gradients over ranks, so with equal parts the
    gradient is that of the mean over the global batch, as in one process with the whole batch.

    Attributes:
        wrapper: the module that is called: ``model``, or data parallelism around it.
        problem: the step or the loss, and the optimizer.
        batches: this rank's part of each global batch, in micro-batches if the arm processes them in turn.
        arm: how it processes a batch.
        settings: learning rates fall to zero in ``steps`` steps, each of ``accumulate`` batches.
    """

    wrapper: nn.Module
    model: nn.Module
    problem: Problem
    batches: Batches
    arm: Arm
    seed: int
    settings: CompareSettings
    ranks: Ranks
    optimizer: Any = field(init=False)
    losses: list[Tensor] = field(default_factory=list)
    steps_done: int = 0

    def __post_init__(self) -> None:
        """Creates the optimizers."""
        self.optimizer = self.problem.optimizers(self.model, self.settings)
        self._optimizers = list_of(self.optimizer, self.problem.optimizer_name)
        self._groups = [(group, group["lr"]) for each in self._optimizers for group in each.param_groups]
        self._set_precision(self.settings.amp)

    def _set_precision(self, amp: str) -> None:
        self._amp = amp
        self._scaler = torch.amp.GradScaler(self.ranks.device.type, enabled=amp == "float16")

    def step(self, recorder: Recorder | None = None) -> StepTimes:
        """One step; ``recorder`` copies the gradients before the update.

        Collective: those of the wrapper and the norm layers; every rank of the arm must call.
        """
        device, settings = self.ranks.device, self.settings
        self.wrapper.train()
        factor = 0.5 * (1 + math.cos(math.pi * min(1.0, self.steps_done / settings.steps)))
        for group, initial in self._groups:
            group["lr"] = initial * factor
        shares = [share / settings.accumulate for _ in range(settings.accumulate) for share in self.batches.shares]
        batches = [(share, to_device(self.batches.next(), device)) for share in shares]
        # For dropout, which differs between ranks.
        seed_everything(self.seed + 1000 * self.steps_done + self.ranks.rank)
        self.steps_done += 1
        synchronize(device)
        started = time.perf_counter()
        train = self._let_train if self.problem.trains_by_itself else self._train
        loss, backward_done = train(batches, recorder)
        synchronize(device)
        self.losses.append(loss.detach().float())
        return StepTimes(time.perf_counter() - started, backward_done)

    def _train(self, batches: list[tuple[float, Any]], recorder: Recorder | None) -> tuple[Tensor, float]:
        """Forward, backward and update; the mean loss, and when the backward was done.

        The share of a batch in the samples of the step is the weight of its loss.
        """
        total = torch.zeros((), device=self.ranks.device)
        for optimizer in self._optimizers:
            optimizer.zero_grad()
        for number, (share, batch) in enumerate(batches, start=1):
            with self._reduced_after(number == len(batches)), self._in_step():
                with autocast(self._amp, self.ranks.device):
                    loss = share * self._loss(batch)
                self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            total += loss.detach()
        backward_done = time.perf_counter()
        if recorder:
            recorder.record_gradients()
        for optimizer in self._optimizers:
            self._scaler.step(optimizer)
        self._scaler.update()
        return total, backward_done

    def _let_train(self, batches: list[tuple[float, Any]], recorder: Recorder | None) -> tuple[Tensor, float]:
        """Calls a step that runs backward and optimizers itself; what it recorded, and when the last update began."""
        step, last_update, total = self.problem.step, 0.0, torch.zeros(())
        assert step is not None

        def before_update(*_: Any) -> None:
            nonlocal last_update
            last_update = time.perf_counter()
            if recorder:
                recorder.record_gradients()

        hooks = [each.register_step_pre_hook(before_update) for each in self._optimizers]
        try:
            for share, batch in batches:
                with autocast(self._amp, self.ranks.device):
                    recorded = step(self.wrapper, batch, self.optimizer)
                total += share * as_loss(recorded, f"the step {self.problem.step_name}").detach().cpu()
        finally:
            for hook in hooks:
                hook.remove()
        return total, last_update or time.perf_counter()

    def _loss(self, batch: Any) -> Tensor:
        if isinstance(getattr(self.wrapper, "module", None), WholeStep):
            loss: Tensor = self.wrapper(batch)
            return loss
        return self.problem.loss_of(self.wrapper, batch)

    def _in_step(self) -> AbstractContextManager[Any]:
        """Splits the batch of a forward into micro-batches that run in step, if the arm does."""
        # The model inside of DDP, which then sees one forward.
        return whole_batch(self.model, micro_batches=self.arm.micro_batches) if self.arm.in_step else nullcontext()

    def _reduced_after(self, last: bool) -> AbstractContextManager[Any]:
        """DDP adds up the gradients of several batches on each rank, and averages them over ranks after the last."""
        no_sync: Callable[[], AbstractContextManager[Any]] | None = getattr(self.wrapper, "no_sync", None)
        return nullcontext() if last or no_sync is None else no_sync()

    def record(self, steps: int, recorder: Recorder | None) -> dict[int, Snapshot]:
        """Snapshots of some of ``steps`` training steps, in full precision and without dropout.

        There are none without a recorder.

        Collective: as `step`.
        """
        self._set_precision("")
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


def curve(losses: list[float], max_points: int = 50) -> tuple[Point, ...]:
    """Splits the steps into up to ``max_points`` intervals: the mean of each, at its last step."""
    ends = sorted({round(len(losses) * (i + 1) / max_points) for i in range(max_points)} - {0})
    points = []
    for start, end in pairwise((0, *ends)):
        value = sum(losses[start:end]) / (end - start)
        points.append(Point(end, value if math.isfinite(value) else None))
    return tuple(points)
