"""The model benchmark: training steps of DDP with local and with synchronized batch norm, in turn on the same ranks.

On request also how the time of a synchronized step is spent: a trace per rank, and the wait of each norm layer.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from syncnorm.comm import Kind
from syncnorm.conversion.convert import convert
from syncnorm.errors import InputError
from syncnorm.tools.bench.contenders import add_bare_collectives
from syncnorm.tools.bench.measure import interleaved, timings, warm_up
from syncnorm.tools.bench.records import BenchSettings, LayerWait, ModelResult, RankProfile
from syncnorm.tools.common.nets import RESNET_CLASSES, RESNET_NAME, build_resnet18
from syncnorm.tools.common.progress import Tell
from syncnorm.tools.common.ranks import Ranks
from syncnorm.tools.common.timing import ExchangeTimes, record_exchanges, synchronize

MODEL_STAGES = 3  # labels that `measure_model` reports
# Names in files.
DDP, DDP_AND_COLLECTIVES, SYNCED, COMPILED = "ddp", "ddp+floor", "ddp+syncnorm", "ddp+syncnorm compiled"
_STEPS_PER_BLOCK = 1
_LR, _MOMENTUM = 0.01, 0.9
_PROFILED_STEPS = 3
# The first steps under a profiler pay for its start.
_PROFILER_WARM_UP = 1


def arm_label(name: str) -> str:
    """The name of an arm in tables."""
    return "ddp+collectives" if name == DDP_AND_COLLECTIVES else name


@dataclass
class TrainingStep:
    """Forward, loss, backward and optimizer step of one arm, always on the same batch.

    Collective: the collectives of DDP and of the norm layers.
    """

    model: nn.Module
    images: Tensor
    labels: Tensor
    _optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        self._optimizer = torch.optim.SGD(self.model.parameters(), _LR, _MOMENTUM)

    def __call__(self) -> None:
        """One step."""
        self._optimizer.zero_grad()
        loss = F.cross_entropy(self.model(self.images), self.labels)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self._optimizer.step()


def measure_model(settings: BenchSettings, ranks: Ranks, tell: Tell) -> ModelResult:
    """Times the arms, and profiles the synchronized one if requested. Collective: all ranks."""
    images, labels = _batch(settings, ranks)
    plain = build_resnet18(settings.width)
    models: dict[str, nn.Module] = {
        DDP: build_resnet18(settings.width),
        DDP_AND_COLLECTIVES: add_bare_collectives(build_resnet18(settings.width)),
        SYNCED: convert(build_resnet18(settings.width)),
    }
    if settings.compiled:
        compiled = convert(build_resnet18(settings.width))
        compiled.compile()
        models[COMPILED] = compiled
    steps = {name: TrainingStep(_in_ddp(model, ranks), images, labels) for name, model in models.items()}
    tell("model: warm-up")
    warm_up(steps)
    tell(f"model: {len(steps)} arms in turn")
    seconds = interleaved(steps, ranks, settings.repetitions, _STEPS_PER_BLOCK)
    tell("model: profile" if settings.profile else "model: done")
    return ModelResult(
        name=RESNET_NAME,
        num_parameters=sum(p.numel() for p in plain.parameters()),
        num_norm_layers=sum(isinstance(m, nn.BatchNorm2d) for m in plain.modules()),
        input_shape=tuple(images.shape),
        steps_per_block=_STEPS_PER_BLOCK,
        arms=timings(seconds, (DDP, DDP_AND_COLLECTIVES, SYNCED), {}),
        profile=_profiled(steps[SYNCED], Path(settings.profile), ranks) if settings.profile else (),
    )


def _batch(settings: BenchSettings, ranks: Ranks) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(ranks.rank)
    images = torch.randn(settings.batch_per_rank, 3, settings.side, settings.side, generator=generator)
    labels = torch.randint(RESNET_CLASSES, (settings.batch_per_rank,), generator=generator)
    return images.to(ranks.device), labels.to(ranks.device)


def _in_ddp(model: nn.Module, ranks: Ranks) -> nn.Module:
    on_gpu = ranks.device.type == "cuda"
    return DistributedDataParallel(model.to(ranks.device), device_ids=[ranks.device] if on_gpu else None)


def _profiled(step: TrainingStep, folder: Path, ranks: Ranks) -> tuple[RankProfile, ...]:
    """Runs some steps under torch's profiler; writes ``folder/rank{r}.json``, for chrome://tracing or Perfetto.

    Returns:
        The profiles of all ranks, on every rank.

    Collective: all ranks; the collectives of the steps, and one object gather.
    """
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * (ranks.device.type == "cuda")]
    exchanges, total, until_last_gradient = ExchangeTimes(), 0.0, 0.0
    with record_exchanges(exchanges, step.model):
        for _ in range(_PROFILER_WARM_UP):
            step()
        exchanges.seconds.clear()
        ranks.wait()
        with profile(activities=activities) as trace:
            for _ in range(_PROFILED_STEPS):
                synchronize(ranks.device)
                started = time.perf_counter()
                step()
                synchronize(ranks.device)
                total += time.perf_counter() - started
                until_last_gradient += exchanges.last_gradient - started
    trace.export_chrome_trace(str(folder / f"rank{ranks.rank}.json"))
    ms_per_step = 1e3 / _PROFILED_STEPS
    return tuple(
        ranks.collect(
            RankProfile(
                rank=ranks.rank,
                steps=_PROFILED_STEPS,
                step_ms=total * ms_per_step,
                norm_ms=exchanges.total() * ms_per_step,
                compute_ms=(until_last_gradient - exchanges.total()) * ms_per_step,
                rest_ms=(total - until_last_gradient) * ms_per_step,
                layers=_layer_waits(exchanges, ms_per_step),
            )
        )
    )


def _layer_waits(exchanges: ExchangeTimes, ms_per_step: float) -> tuple[LayerWait, ...]:
    names = dict.fromkeys(layer for layer, _ in exchanges.seconds)
    return tuple(
        LayerWait(
            name,
            exchanges.seconds.get((name, Kind.FORWARD), 0.0) * ms_per_step,
            exchanges.seconds.get((name, Kind.BACKWARD), 0.0) * ms_per_step,
        )
        for name in names
    )


def make_folder(folder: Path) -> None:
    """Creates ``folder`` if it does not exist, and tries to write in it.

    Raises:
        InputError: the folder cannot be created or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".syncnorm"
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"cannot write in {folder}: {error.strerror}") from error
