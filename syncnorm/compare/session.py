"""A comparison as one rank lives through it: arm after arm, together with the other ranks."""

from __future__ import annotations

import platform
import time
from dataclasses import dataclass, replace
from datetime import datetime, timezone

import torch
from torch import nn

import syncnorm
from syncnorm.compare.arms import ARMS, SINGLE, Arm, EmulatedDataParallel, wrap
from syncnorm.compare.data import load_digits
from syncnorm.compare.measure import Snapshot, median_step, parity
from syncnorm.compare.models import build_model
from syncnorm.compare.progress import Progress, ProgressFactory, silent
from syncnorm.compare.ranks import Ranks
from syncnorm.compare.records import ArmResult, Comparison, Settings
from syncnorm.compare.training import Part, Trainer, accuracy


def compare_on_rank(settings: Settings, command: str, ranks: Ranks, open_progress: ProgressFactory) -> Comparison:
    """Trains and measures every arm of ``settings``; the same record on every rank.

    Collective: all ranks.
    """
    started = time.perf_counter()
    # Imports scikit-learn, which takes seconds that no arm should be charged with.
    digits = load_digits()
    # So do the first optimiser, the first DDP and the first collectives.
    with silent(1) as progress:
        _Session(replace(settings, steps=1, parity_steps=1), ranks, progress).run(ARMS["ddp+syncbn"])
    watcher = open_progress if ranks.rank == 0 else silent
    with watcher(len(settings.arms)) as progress:
        session = _Session(settings, ranks, progress)
        results = tuple(session.run(ARMS[name]) for name in settings.arms)
    model = build_model(settings.seed)
    comparison = Comparison(
        settings=settings,
        hardware=ranks.hardware(),
        syncnorm_version=syncnorm.__version__,
        torch_version=torch.__version__,
        python_version=platform.python_version(),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        command=command,
        num_parameters=sum(p.numel() for p in model.parameters()),
        num_norm_layers=sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()),
        num_train=len(digits.train_y),
        num_test=len(digits.test_y),
        arms=results,
        wall_seconds=time.perf_counter() - started,
    )
    return ranks.share(comparison if ranks.rank == 0 else None)


@dataclass
class _Session:
    """What the arms share, and the reference snapshots that the first of them leaves for the others."""

    settings: Settings
    ranks: Ranks
    progress: Progress
    reference: dict[int, Snapshot] | None = None

    def run(self, arm: Arm) -> ArmResult:
        started = time.perf_counter()
        self.progress.start(arm.name, self.settings.steps)
        if arm.spread == "ddp" or self.ranks.rank == 0:
            result = self._train(arm, started)
        else:
            result = ArmResult(arm.name, arm.name, ranks=1)
        self.ranks.wait()
        self.progress.finish(result)
        return result

    def _train(self, arm: Arm, started: float) -> ArmResult:
        settings, ranks, digits = self.settings, self.ranks, load_digits()
        num_ranks = ranks.world_size if arm.spread == "ddp" else 1
        try:
            plain = arm.norms(build_model(settings.seed).to(ranks.device), settings.num_groups)
            module = wrap(arm, plain, ranks.world_size, ranks.device)
        except ValueError as error:
            if not arm.torch_may_refuse:
                raise
            return ArmResult(arm.name, arm.name, num_ranks, not_run=f"torch refuses: {error}")

        trainer = Trainer(module, plain, digits, settings, self._part(arm))
        trained = trainer.train(self.progress)
        if arm is SINGLE:
            self.reference = trained.snapshots
        reference = self.reference or {}
        test_accuracy = accuracy(plain, digits, ranks.device) if ranks.rank == 0 else None
        step_seconds = median_step(trained.step_seconds)
        return ArmResult(
            name=arm.name,
            label=f"{arm.name} (emulated)" if isinstance(module, EmulatedDataParallel) else arm.name,
            ranks=num_ranks,
            test_accuracy=test_accuracy,
            step_seconds=step_seconds,
            samples_per_second=settings.global_batch / step_seconds,
            collectives=trainer.count_collectives(),
            parity=tuple(
                parity(step, ours, reference[step]) for step, ours in trained.snapshots.items() if reference
            ),
            wall_seconds=time.perf_counter() - started,
        )

    def _part(self, arm: Arm) -> Part:
        per_rank, rank = self.settings.batch_per_rank, self.ranks.rank
        if arm.spread == "ddp":
            return Part(rank * per_rank, (rank + 1) * per_rank, self.ranks.device)
        return Part(0, self.settings.global_batch, self.ranks.device)
