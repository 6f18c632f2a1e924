"""How long ranks stand still for each other: in the norm layers' exchanges over gloo, and in DDP's."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from syncnorm.collectives import Call, Kind
from syncnorm.collectives.observers import observers
from syncnorm.compare.evidence import Wait
from syncnorm.ranks import Ranks

STEPS = 5


class StepTimes(NamedTuple):
    """Seconds that a training step took, and when its backward ended."""

    seconds: float
    backward_done: float


@dataclass
class Exchanges:
    """Seconds inside exchanges, by layer and kind, since `clear`; and when the last gradient arrived."""

    seconds: dict[tuple[str, Kind], float] = field(default_factory=dict)
    last_gradient: float = 0.0

    def note(self, call: Call, seconds: float) -> None:
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
    hooks = [
        p.register_post_accumulate_grad_hook(noted.gradient)  # type: ignore[no-untyped-call]
        for p in model.parameters()
        if p.requires_grad
    ]
    observers.append(noted.note)
    try:
        yield
    finally:
        observers.remove(noted.note)
        for hook in hooks:
            hook.remove()


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
