"""The arms of a comparison on one rank: parity, a training run for each seed, and the cost of a step."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from syncnorm.comm.process_groups import no_sync_stats
from syncnorm.errors import InputError, SyncNormError
from syncnorm.tools.common.data import Batches, to_device
from syncnorm.tools.common.data_parallel import EmulatedDataParallel
from syncnorm.tools.common.errors import one_line
from syncnorm.tools.common.ranks import Ranks
from syncnorm.tools.compare.arms import SINGLE, Arm, arm_named, communicates
from syncnorm.tools.compare.evaluation import Evaluation, evaluate
from syncnorm.tools.compare.measurements import measure_divergence, median_step, watch_memory
from syncnorm.tools.compare.parity import Recorder, Snapshot, measure_parity
from syncnorm.tools.compare.problem import Problem
from syncnorm.tools.compare.records import (
    ArmResult,
    CompareSettings,
    LayerDivergence,
    Parity,
    PeakMemory,
    Point,
    SeedResult,
    Task,
)
from syncnorm.tools.compare.training import Trainer, curve
from syncnorm.tools.compare.turns import BASELINE, time_in_turns
from syncnorm.tools.compare.wrapping import RECALIBRATION_BATCHES, recalibrated, wrap
from syncnorm.training import whole_batch

if TYPE_CHECKING:
    from accelerate import Accelerator

# Evaluations during a training run, including the one at its end.
EVALUATIONS = 4


class ArmProgress:
    """Receives the progress of a comparison on rank 0; this base class shows nothing."""

    def start(self, label: str, steps: int) -> None:
        """A training run of ``steps`` steps begins."""

    def step(self) -> None:
        """One of its training steps is done."""

    def finish(self, result: ArmResult) -> None:
        """The run is done; its arm has ``result`` so far."""


# Called with the number of training runs, or None if it is not known, in the process of rank 0, which may be a
# spawned one: it must pickle.
ArmProgressFactory = Callable[[int | None], AbstractContextManager[ArmProgress]]


def no_progress(num_runs: int | None) -> AbstractContextManager[ArmProgress]:
    """An `ArmProgressFactory` that shows nothing."""
    return nullcontext(ArmProgress())


@dataclass
class ArmRunner:
    """Runs the arms of a comparison on this rank: `train` for each seed, then `time_steps`.

    Attributes:
        results: of each arm, so far.
        reference: the snapshots of ``single``, which must run first; on rank 0.
        divergence: of the ``ddp`` arm's statistics between ranks, once that arm has run.
    """

    problem: Problem
    task: Task
    datasets: Any
    settings: CompareSettings
    ranks: Ranks
    accelerator: Accelerator
    progress: ArmProgress
    results: dict[str, ArmResult] = field(default_factory=dict)
    reference: dict[int, Snapshot] = field(default_factory=dict)
    divergence: tuple[LayerDivergence, ...] = ()

    def train(self, seed: int) -> None:
        """Trains and tests every arm once. Collective: all ranks."""
        for name in self.settings.arms:
            arm = arm_named(name)
            started = time.perf_counter()
            if name not in self.results:
                with _in_one_line(name):
                    self.results[name] = self._set_up(arm)
            result = self.results[name]
            self.progress.start(f"{name}, seed {seed}", self.settings.steps)
            if result.not_run is None:
                if self._takes_part(arm):
                    with _in_one_line(name):
                        result = self._run(arm, seed, result)
                result = replace(result, wall_seconds=(result.wall_seconds or 0.0) + time.perf_counter() - started)
                self.results[name] = result
            self.progress.finish(result)
            self.ranks.wait()

    def time_steps(self) -> None:
        """Measures the duration of a training step of each arm. Collective: all ranks."""
        arms = [arm_named(name) for name, result in self.results.items() if result.not_run is None]
        seed = self.settings.seeds[0]
        training_seconds = sum(result.wall_seconds or 0.0 for result in self.results.values())
        trainers = {arm.name: self._trainer(arm, seed) if self._takes_part(arm) else None for arm in arms}
        for name, (step, cost) in time_in_turns(trainers, self.ranks, training_seconds).items():
            self.results[name] = replace(self.results[name], step=step, cost=cost if name != BASELINE else None)
        for trainer in trainers.values():
            self._release(trainer)

    def _takes_part(self, arm: Arm) -> bool:
        return arm.parallelism == "ddp" or self.ranks.rank == 0

    def _set_up(self, arm: Arm) -> ArmResult:
        """The arm's result before its first run: its parity, or why it does not run. Collective: all ranks."""
        result = ArmResult(arm.name, arm.name, self.ranks.world_size if arm.parallelism == "ddp" else 1)
        trainer, error_here = self._first_trainer(arm) if self._takes_part(arm) else (None, None)
        if errors := self.ranks.collect(error_here):
            return replace(result, not_run=errors[0])
        if trainer is None:
            return result
        if isinstance(trainer.wrapper, EmulatedDataParallel):
            result = replace(result, label=f"{arm.name} (emulated)")
        result = replace(result, parity=self._parity(arm, trainer))
        self._release(trainer)
        return result

    def _run(self, arm: Arm, seed: int, result: ArmResult) -> ArmResult:
        """``result`` with one more training run; the first also gives the memory, collectives and divergence."""
        peak_memory = watch_memory(self.ranks.device)
        trainer = self._trainer(arm, seed)
        is_first = not result.seeds
        result = replace(result, seeds=(*result.seeds, self._train(arm, trainer)))
        if is_first:
            result = replace(result, memory=self._max_over_ranks(arm, peak_memory()))
            # Further steps change the model, which has been tested before.
            result = replace(result, collectives=trainer.count_collectives())
            if arm.name == BASELINE:
                layers = self.task.norm_layers
                self.divergence = measure_divergence(trainer.model, layers, trainer.step, self.ranks)
        self._release(trainer)
        return result

    def _first_trainer(self, arm: Arm) -> tuple[Trainer | None, str | None]:
        """The first seed's trainer; or why the arm cannot run on this rank."""
        try:
            trainer = self._trainer(arm, self.settings.seeds[0])
            self._try_forward(arm, trainer.model)
        except (ValueError, SyncNormError) as error:
            return None, f"torch refuses: {error}" if arm.torch_may_refuse else str(error)
        return trainer, None

    def _trainer(self, arm: Arm, seed: int) -> Trainer:
        settings, ranks = self.settings, self.ranks
        model = arm.convert_norms(self.problem.model(seed), settings.num_groups).to(ranks.device)
        wrapper = wrap(arm, model, self.problem, ranks)
        batches = self._batches(self._samples(arm), seed, settings.num_workers, arm.micro_batches_in_turn)
        return Trainer(wrapper, model, self.problem, batches, arm, seed, settings, ranks)

    def _batches(self, samples: slice, seed: int, num_workers: int = 0, micro_batches: int = 1) -> Batches:
        data, size, collate = self.datasets[0], self.settings.global_batch, self.problem.collate
        return Batches(data, size, samples, seed, collate, num_workers, micro_batches)

    def _samples(self, arm: Arm) -> slice:
        """The samples of each global batch that this rank trains on."""
        per_rank, rank = self.settings.batch_per_rank, self.ranks.rank
        if arm.parallelism == "ddp":
            return slice(rank * per_rank, (rank + 1) * per_rank)
        return slice(0, self.settings.global_batch)

    def _try_forward(self, arm: Arm, model: nn.Module) -> None:
        """A step of a copy without communication, to find out before the training that a norm rejects such inputs.

        Or, if micro-batches run in step, that the model cannot be divided.
        """
        if communicates(arm, model) and not arm.in_step:
            return
        samples = slice(0, self.settings.batch_per_rank) if arm.parallelism == "dp" else self._samples(arm)
        batches = self._batches(samples, self.settings.seeds[0], micro_batches=arm.micro_batches_in_turn)
        # The last is the smallest.
        batch = to_device([batches.next() for _ in batches.shares][-1], self.ranks.device)
        if arm.parallelism == "dp" and not isinstance(batch[0], Tensor):
            raise InputError(
                f"DataParallel splits a tensor, and the model is called with a {type(batch[0]).__name__}"
            )
        if arm.in_step:
            model = copy.deepcopy(model).train()
            with no_sync_stats(), whole_batch(model, micro_batches=arm.micro_batches):
                self.problem.loss_of(model, batch)
        else:
            self.problem.try_step(model, batch, self.settings)

    def _parity(self, arm: Arm, trainer: Trainer) -> tuple[Parity, ...]:
        settings, layers = self.settings, self.task.norm_layers
        # Rank 0's samples are the first of the global batch.
        part = (settings.batch_per_rank, settings.global_batch) if arm.parallelism == "single" else (1, 1)
        # The replicas of nn.DataParallel run in threads, in no fixed order; the emulation runs replica 0 first.
        hooked = () if isinstance(trainer.wrapper, nn.DataParallel) else layers
        recorder = Recorder(trainer.model, hooked, part) if self.ranks.rank == 0 else None
        snapshots = trainer.record(settings.parity_steps, recorder)
        if arm is SINGLE:
            self.reference = snapshots
        if not self.reference:
            return ()
        world_size = self.ranks.world_size if arm.parallelism == "ddp" else 1
        return tuple(
            measure_parity(step, snapshot, self.reference[step], layers, world_size)
            for step, snapshot in snapshots.items()
        )

    def _train(self, arm: Arm, trainer: Trainer) -> SeedResult:
        steps = self.settings.steps
        evaluated_after = {round(steps * (i + 1) / EVALUATIONS) for i in range(EVALUATIONS)} - {0}
        seconds: list[float] = []
        tests: dict[int, Evaluation] = {}
        for step in range(1, steps + 1):
            seconds.append(trainer.step().seconds)
            self.progress.step()
            if step in evaluated_after:
                with self._ready_to_test(arm, trainer):
                    if self.ranks.rank == 0:
                        tests[step] = evaluate(
                            trainer.model,
                            self.problem,
                            self.datasets[1],
                            self.settings,
                            self.ranks.device,
                            with_units=step == steps,
                        )
                if arm.parallelism == "ddp":
                    self.ranks.wait()
        losses = torch.stack(trainer.losses).double().cpu()
        if arm.parallelism == "ddp":
            losses = torch.stack(self.ranks.collect(losses)).mean(0)
        last = tests.get(steps, Evaluation(None, None))
        return SeedResult(
            seed=trainer.seed,
            test_metric=last.metric,
            test_loss=last.loss,
            step_seconds=median_step(seconds),
            train_loss=curve(losses.tolist()),
            test_metrics=tuple(Point(step, test.metric) for step, test in tests.items()),
            test_losses=tuple(Point(step, test.loss) for step, test in tests.items()),
            units=last.units,
        )

    def _ready_to_test(self, arm: Arm, trainer: Trainer) -> AbstractContextManager[None]:
        if not arm.recalibrated:
            return nullcontext()
        batches = self._batches(self._samples(arm), trainer.seed)
        moved = (to_device(batches.next(), self.ranks.device) for _ in range(RECALIBRATION_BATCHES))
        return recalibrated(trainer.model, self.problem.loss_of, moved)

    def _max_over_ranks(self, arm: Arm, memory: PeakMemory | None) -> PeakMemory | None:
        by_rank = self.ranks.collect(memory) if arm.parallelism == "ddp" else [memory]
        return max((m for m in by_rank if m is not None), key=lambda m: m.peak_bytes, default=None)

    def _release(self, trainer: Trainer | None) -> None:
        if trainer is None:
            return
        # The next arm's memory must not include this one's.
        trainer.wrapper = trainer.model = trainer.optimizer = None  # type: ignore[assignment]  # not used again
        self.accelerator.free_memory()


@contextmanager
def _in_one_line(arm: str) -> Iterator[None]:
    """Turns an exception of the user's code that appears during the training into an `InputError` of one line."""
    try:
        yield
    except (SyncNormError, dist.DistError):
        raise
    except Exception as error:  # from the user's code
        raise InputError(f"arm {arm}: {one_line(error)}") from error
