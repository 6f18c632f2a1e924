"""One arm, from the model to its result: parity, a training run for each seed, and what a step costs."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, field, replace
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from syncnorm.tools.common.data import Batches
from syncnorm.tools.common.data_parallel import EmulatedDataParallel, data_parallel
from syncnorm.tools.common.ranks import Ranks
from syncnorm.tools.compare.arms import SINGLE, Arm
from syncnorm.tools.compare.evidence import LayerSpread, Parity, Point, SeedResult
from syncnorm.tools.compare.layer_spread import measure_spread
from syncnorm.tools.compare.measure import median_step
from syncnorm.tools.compare.memory import watch_memory
from syncnorm.tools.compare.parity import Recorder, Snapshot, parity
from syncnorm.tools.compare.problem import Problem
from syncnorm.tools.compare.progress import Progress
from syncnorm.tools.compare.records import ArmResult, Settings, Task
from syncnorm.tools.compare.training import Part, Trainer, curve, evaluate
from syncnorm.tools.compare.waiting import measure_wait

if TYPE_CHECKING:
    from accelerate import Accelerator

# Evaluations during a training run, the one at its end among them.
EVALUATIONS = 4


@dataclass
class Session:
    """What the arms share, and the reference snapshots that the first of them leaves for the others."""

    problem: Problem
    task: Task
    datasets: Any
    settings: Settings
    ranks: Ranks
    accelerator: Accelerator
    progress: Progress
    reference: dict[int, Snapshot] = field(default_factory=dict)
    spread: tuple[LayerSpread, ...] = ()

    def run(self, arm: Arm) -> ArmResult:
        """Trains ``arm`` with every seed. Collective: all ranks, also those that have no part in it."""
        started = time.perf_counter()
        self.progress.start(arm.name, self.settings.steps * len(self.settings.seeds))
        if arm.spread == "ddp" or self.ranks.rank == 0:
            result = self._measure(arm)
        else:
            result = ArmResult(arm.name, arm.name, ranks=1)
        self.ranks.wait()
        result = replace(result, wall_seconds=None if result.not_run else time.perf_counter() - started)
        self.progress.finish(result)
        return result

    def _measure(self, arm: Arm) -> ArmResult:
        settings = self.settings
        blank = ArmResult(arm.name, arm.name, self.ranks.world_size if arm.spread == "ddp" else 1)
        first, refusal = self._first(arm)
        if first is None:
            return replace(blank, not_run=refusal)
        if isinstance(first.module, EmulatedDataParallel):
            blank = replace(blank, label=f"{arm.name} (emulated)")
        blank = replace(blank, parity=self._parity(arm, first))
        self._forget(first)

        runs: list[SeedResult] = []
        for seed in settings.seeds:
            watched = watch_memory(self.ranks.device)
            trainer = self._trainer(arm, seed)
            runs.append(self._train(arm, trainer))
            if seed == settings.seeds[0]:
                blank = replace(blank, memory=self._largest(arm, watched()))
                blank = self._cost(arm, trainer, blank)
            self._forget(trainer)
        step_seconds = median(run.step_seconds for run in runs)
        return replace(
            blank,
            seeds=tuple(runs),
            step_seconds=step_seconds,
            samples_per_second=settings.global_batch / step_seconds,
        )

    def _first(self, arm: Arm) -> tuple[Trainer | None, str | None]:
        """The first seed's trainer; or why the arm cannot run, on all of its ranks alike."""
        trainer, refusal = None, None
        try:
            trainer = self._trainer(arm, self.settings.seeds[0])
            self._probe(arm, trainer.plain)
        except ValueError as error:
            refusal = f"torch refuses: {error}" if arm.torch_may_refuse else str(error)
        refusals = self.ranks.collect(refusal) if arm.spread == "ddp" else [refusal]
        refusal = next((each for each in refusals if each), None)
        return (None, refusal) if refusal else (trainer, None)

    def _trainer(self, arm: Arm, seed: int) -> Trainer:
        settings, ranks = self.settings, self.ranks
        plain = arm.norms(self.problem.model(seed), settings.num_groups).to(ranks.device)
        if arm.spread == "ddp":
            module = self.accelerator.prepare(plain)
        else:
            module = data_parallel(plain, ranks.world_size, ranks.device) if arm.spread == "dp" else plain
        return Trainer(
            module,
            plain,
            self.problem.loss,
            Batches(self.datasets[0], settings.global_batch, self._part(arm).samples, seed),
            self._part(arm),
            seed,
            settings.lr,
            settings.momentum,
            settings.steps,
            self.accelerator,
        )

    def _part(self, arm: Arm) -> Part:
        per_rank, rank = self.settings.batch_per_rank, self.ranks.rank
        whole = slice(0, self.settings.global_batch)
        mine = slice(rank * per_rank, (rank + 1) * per_rank)
        return Part(mine if arm.spread == "ddp" else whole, rank, self.ranks.device)

    @torch.no_grad()
    def _probe(self, arm: Arm, plain: nn.Module) -> None:
        """One forward of each norm that asks no other rank, to learn in time that it refuses such inputs."""
        if arm.synced:
            return
        part = slice(0, self.settings.batch_per_rank) if arm.spread == "dp" else self._part(arm).samples
        batches = Batches(self.datasets[0], self.settings.global_batch, part, self.settings.seeds[0])
        copy.deepcopy(plain).train()(batches.next()[0].to(self.ranks.device))

    def _parity(self, arm: Arm, trainer: Trainer) -> tuple[Parity, ...]:
        settings, layers = self.settings, self.task.norm_layers
        # Rank 0's part is the first of the global batch.
        rows = (settings.batch_per_rank, settings.global_batch) if arm.spread == "whole" else (1, 1)
        # Its replicas run in threads, in no order; the emulation's first call is that of the first part.
        seen = () if isinstance(trainer.module, nn.DataParallel) else layers
        recorder = Recorder(trainer.plain, seen, rows) if self.ranks.rank == 0 else None
        snapshots = trainer.record(settings.parity_steps, recorder)
        if arm is SINGLE:
            self.reference = snapshots
        if not self.reference:
            return ()
        return tuple(
            parity(step, ours, self.reference[step], layers, self.ranks.world_size if arm.spread == "ddp" else 1)
            for step, ours in snapshots.items()
        )

    def _train(self, arm: Arm, trainer: Trainer) -> SeedResult:
        steps, metric = self.settings.steps, self.task.metric
        evaluated_after = {round(steps * (i + 1) / EVALUATIONS) for i in range(EVALUATIONS)} - {0}
        seconds: list[float] = []
        points: list[tuple[int, float | None, float | None]] = []
        for step in range(1, steps + 1):
            seconds.append(trainer.step().seconds)
            self.progress.step()
            if step in evaluated_after:
                if self.ranks.rank == 0:
                    found = evaluate(trainer.plain, self.problem.loss, self.datasets[1], metric, self.ranks.device)
                    points.append((step, *found))
                if arm.spread == "ddp":
                    self.ranks.wait()
        losses = torch.stack(trainer.losses).double().cpu()
        if arm.spread == "ddp":
            losses = torch.stack(self.ranks.collect(losses)).mean(0)
        last = points[-1] if points else (steps, None, None)
        return SeedResult(
            seed=trainer.seed,
            test_accuracy=last[1],
            test_loss=last[2],
            step_seconds=median_step(seconds),
            train_loss=curve(losses.tolist()),
            test_accuracies=tuple(Point(p[0], p[1]) for p in points) if metric == "accuracy" else (),
            test_losses=tuple(Point(p[0], p[2]) for p in points),
        )

    def _cost(self, arm: Arm, trainer: Trainer, result: ArmResult) -> ArmResult:
        """What a step sends and waits for, after the training."""
        result = replace(result, collectives=trainer.count_collectives())
        if arm.spread != "ddp":
            return result
        if self.ranks.device.type != "cuda":
            result = replace(result, wait=measure_wait(trainer.step, trainer.module, trainer.plain, self.ranks))
        if arm.name == "ddp":
            batches = trainer.batches
            self.spread = measure_spread(trainer.plain, self.task.norm_layers, batches, self.ranks)
        return result

    def _largest(self, arm: Arm, memory: Any) -> Any:
        """That of the rank that needs most."""
        found = self.ranks.collect(memory) if arm.spread == "ddp" else [memory]
        return max((m for m in found if m is not None), key=lambda m: m.peak_bytes, default=None)

    def _forget(self, trainer: Trainer) -> None:
        trainer.module = trainer.plain = trainer.optimizer = None  # type: ignore[assignment]
        self.accelerator.free_memory()
