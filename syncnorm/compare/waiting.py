"""How long ranks stand still for each other: in the norm layers' exchanges, and in DDP's.

The layers' own code notes nothing: while a measurement lasts, the functions that communicate are replaced by ones
that look at the clock. On a GPU the ``direct`` ones return before the collective is done, so their waits are launch
times.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from syncnorm.collectives import Exchange, Kind, direct
from syncnorm.compare.evidence import Wait
from syncnorm.ranks import Ranks

STEPS = 5
# Where tensors of norm layers are communicated.
_COMMUNICATING = ((Exchange, "wait"), (direct, "gather"), (direct, "reduce"))


class StepTimes(NamedTuple):
    """Seconds that a training step took, and when its backward ended."""

    seconds: float
    backward_done: float


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


def measure_wait(step: Callable[[], StepTimes], wrapper: nn.Module, model: nn.Module, ranks: Ranks) -> Wait:
    """The wait in some training steps of ``wrapper``, a DistributedDataParallel around ``model``.

    Collective: all ranks; those of the steps, and one object gather.
    """
    noted, entered, ddp, total = Exchanges(), 0.0, 0.0, 0.0

    def enter(*_: Any) -> None:
        nonlocal entered
        entered = time.perf_counter()

    def begin(*_: Any) -> None:
        nonlocal ddp
        ddp += time.perf_counter() - entered

    hooks = [wrapper.register_forward_pre_hook(enter), model.register_forward_pre_hook(begin)]
    try:
        with noting(noted, model):
            for _ in range(STEPS):
                times = step()
                ddp += max(0.0, times.backward_done - noted.last_gradient)
                total += times.seconds
    finally:
        for hook in hooks:
            hook.remove()
    everywhere = ranks.collect((noted.total(), ddp, total))
    return Wait(*(sum(each) / (STEPS * len(everywhere)) for each in zip(*everywhere, strict=True)))
