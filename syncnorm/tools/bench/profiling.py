"""Where the time of a synced training step goes: a trace of each rank, and the wait of each norm layer."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Protocol

from torch import nn
from torch.profiler import ProfilerActivity, profile

from syncnorm.comm import Kind
from syncnorm.errors import InputError
from syncnorm.tools.bench.records import LayerWait, RankProfile
from syncnorm.tools.common.ranks import Ranks
from syncnorm.tools.common.timing import ExchangeTimes, record_exchanges, synchronize

STEPS = 3
# The first steps under a profiler pay for its start.
WARM_UP = 1


class Training(Protocol):
    """A step to call, and the model that it trains."""

    model: nn.Module

    def __call__(self) -> None:
        """One step."""


def profiled(step: Training, folder: Path, ranks: Ranks) -> tuple[RankProfile, ...]:
    """Runs some steps under torch's profiler; writes ``folder/rank{r}.json``, for chrome://tracing or Perfetto.

    Returns:
        A record a rank, on every rank.

    Collective: all ranks; those of the steps, and one object gather.
    """
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * (ranks.device.type == "cuda")]
    noted, total, until_last_gradient = ExchangeTimes(), 0.0, 0.0
    with record_exchanges(noted, step.model):
        for _ in range(WARM_UP):
            step()
        noted.seconds.clear()
        ranks.wait()
        with profile(activities=activities) as trace:
            for _ in range(STEPS):
                synchronize(ranks.device)
                started = time.perf_counter()
                step()
                synchronize(ranks.device)
                total += time.perf_counter() - started
                until_last_gradient += noted.last_gradient - started
    trace.export_chrome_trace(str(folder / f"rank{ranks.rank}.json"))
    per_step = 1e3 / STEPS
    return tuple(
        ranks.collect(
            RankProfile(
                rank=ranks.rank,
                steps=STEPS,
                step_ms=total * per_step,
                norm_ms=noted.total() * per_step,
                compute_ms=(until_last_gradient - noted.total()) * per_step,
                rest_ms=(total - until_last_gradient) * per_step,
                layers=_layers(noted, per_step),
            )
        )
    )


def _layers(noted: ExchangeTimes, per_step: float) -> tuple[LayerWait, ...]:
    names = dict.fromkeys(layer for layer, _ in noted.seconds)
    return tuple(
        LayerWait(
            name,
            noted.seconds.get((name, Kind.FORWARD), 0.0) * per_step,
            noted.seconds.get((name, Kind.BACKWARD), 0.0) * per_step,
        )
        for name in names
    )


def make_folder(folder: Path) -> None:
    """Makes ``folder`` where it is not there, and tries to write in it.

    Raises:
        InputError: that does not go.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".syncnorm"
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"cannot write in {folder}: {error.strerror}") from error
