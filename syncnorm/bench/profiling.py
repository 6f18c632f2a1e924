"""Where the time of a synced training step goes: a trace of each rank, and the wait of each norm layer.

The layers' own code notes nothing: while the profile lasts, the functions that communicate are replaced by ones that
look at the clock. On a GPU the ``direct`` ones return before the collective is done, so their waits are launch times.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from syncnorm.bench.records import LayerWait, RankProfile
from syncnorm.collectives import Exchange, Kind, direct
from syncnorm.compare.measure import synchronize
from syncnorm.compare.ranks import Ranks
from syncnorm.errors import InputError

STEPS = 3
# The first steps under a profiler pay for its start.
WARM_UP = 1

# Where tensors of norm layers are communicated.
_COMMUNICATING = ((Exchange, "wait"), (direct, "gather"), (direct, "reduce"))


class Training(Protocol):
    """A step to call, and the model that it trains."""

    model: nn.Module

    def __call__(self) -> None:
        """One step."""


@dataclass
class Exchanges:
    """Seconds inside exchanges, by layer and kind, since `clear`; and when the last gradient arrived."""

    seconds: dict[tuple[str, Kind], float] = field(default_factory=dict)
    last_gradient: float = 0.0

    def note(self, call: Any, seconds: float) -> None:
        """Adds an exchange; ``call`` says of which layer and what kind."""
        key = call.layer, call.kind
        self.seconds[key] = self.seconds.get(key, 0.0) + seconds

    def gradient(self, parameter: Tensor) -> None:
        """For ``register_post_accumulate_grad_hook``."""
        self.last_gradient = time.perf_counter()

    def total(self) -> float:
        """Seconds in exchanges of all layers."""
        return sum(self.seconds.values())


def profiled(step: Training, folder: Path, ranks: Ranks) -> tuple[RankProfile, ...]:
    """Runs some steps under torch's profiler; writes ``folder/rank{r}.json``, for chrome://tracing or Perfetto.

    Returns:
        A record a rank, on every rank.

    Collective: all ranks; those of the steps, and one object gather.
    """
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * (ranks.device.type == "cuda")]
    noted, total, until_last_gradient = Exchanges(), 0.0, 0.0
    with noting(noted, step.model):
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


@contextmanager
def noting(noted: Exchanges, model: nn.Module) -> Iterator[None]:
    """Has every exchange, and the arrival of ``model``'s gradients, noted while the block runs."""
    originals = [(owner, name, getattr(owner, name)) for owner, name in _COMMUNICATING]
    hooks = [
        p.register_post_accumulate_grad_hook(noted.gradient)  # type: ignore[no-untyped-call]
        for p in model.parameters()
        if p.requires_grad
    ]
    try:
        for owner, name, original in originals:
            setattr(owner, name, _timed(original, noted))
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)
        for hook in hooks:
            hook.remove()


def _timed(function: Callable[..., Any], noted: Exchanges) -> Callable[..., Any]:
    @functools.wraps(function)
    def timed(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            call = next(a for a in (*args, *kwargs.values()) if hasattr(a, "kind") and hasattr(a, "layer"))
            noted.note(call, time.perf_counter() - started)

    return timed


def _layers(noted: Exchanges, per_step: float) -> tuple[LayerWait, ...]:
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
