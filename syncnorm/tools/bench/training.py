"""The model benchmark: training steps of DDP with local and with synced batch norm, in turns in the same ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from syncnorm.conversion.convert import convert
from syncnorm.tools.bench.bare import add_bare_collectives
from syncnorm.tools.bench.measure import interleaved, warm_up
from syncnorm.tools.bench.models import NAME, NUM_CLASSES, build_model
from syncnorm.tools.bench.profiling import profiled
from syncnorm.tools.bench.records import ModelResult, Settings
from syncnorm.tools.bench.statistics import timings
from syncnorm.tools.common.ranks import Ranks

STEPS_PER_BLOCK = 1
MODEL_STAGES = 3  # what `measure_model` tells its watcher
LR, MOMENTUM = 0.01, 0.9
DDP, FLOOR, SYNCED, COMPILED = "ddp", "ddp+floor", "ddp+syncnorm", "ddp+syncnorm compiled"


@dataclass
class TrainingStep:
    """Forward, loss, backward, optimiser step of one arm, on one batch again and again.

    Collective: DDP's and the norm layers'.
    """

    model: nn.Module
    images: Tensor
    labels: Tensor
    _optimiser: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        self._optimiser = torch.optim.SGD(self.model.parameters(), LR, MOMENTUM)

    def __call__(self) -> None:
        """One step."""
        self._optimiser.zero_grad()
        F.cross_entropy(self.model(self.images), self.labels).backward()  # type: ignore[no-untyped-call]
        self._optimiser.step()


def measure_model(settings: Settings, ranks: Ranks, tell: Callable[[str], None]) -> ModelResult:
    """Times the arms, and profiles the synced one if asked to.

    Collective: all ranks.
    """
    images, labels = _batch(settings, ranks)
    plain = build_model(settings.width)
    models: dict[str, nn.Module] = {
        DDP: build_model(settings.width),
        FLOOR: add_bare_collectives(build_model(settings.width)),
        SYNCED: convert(build_model(settings.width)),
    }
    if settings.compiled:
        compiled = convert(build_model(settings.width))
        compiled.compile()
        models[COMPILED] = compiled
    steps = {name: TrainingStep(_in_ddp(model, ranks), images, labels) for name, model in models.items()}
    tell("model: warm-up")
    warm_up(steps)
    tell(f"model: {' and '.join(steps)}")
    seconds = interleaved(steps, ranks, settings.repetitions, STEPS_PER_BLOCK)
    tell("model: profile" if settings.profile else "model: done")
    return ModelResult(
        name=NAME,
        num_parameters=sum(p.numel() for p in plain.parameters()),
        num_norm_layers=sum(isinstance(m, nn.BatchNorm2d) for m in plain.modules()),
        input_shape=tuple(images.shape),
        steps_per_block=STEPS_PER_BLOCK,
        arms=timings(seconds, (DDP, FLOOR, SYNCED), {}),
        profile=profiled(steps[SYNCED], Path(settings.profile), ranks) if settings.profile else (),
    )


def _batch(settings: Settings, ranks: Ranks) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(ranks.rank)
    images = torch.randn(settings.batch_per_rank, 3, settings.side, settings.side, generator=generator)
    labels = torch.randint(NUM_CLASSES, (settings.batch_per_rank,), generator=generator)
    return images.to(ranks.device), labels.to(ranks.device)


def _in_ddp(model: nn.Module, ranks: Ranks) -> nn.Module:
    on_gpu = ranks.device.type == "cuda"
    return DistributedDataParallel(model.to(ranks.device), device_ids=[ranks.device] if on_gpu else None)
