"""Where the time of a training step goes: in the exchanges of the norm layers, or elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from syncnorm.comm import Call, Kind
from syncnorm.comm.call import observers


def synchronize(device: torch.device) -> None:
    """Waits until the device is idle, so that a clock read afterwards measures the work and not its launch."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass
class ExchangeTimes:
    """Seconds spent in exchanges, by layer and kind, and when the last gradient arrived."""

    seconds: dict[tuple[str, Kind], float] = field(default_factory=dict)
    last_gradient: float = 0.0

    def add(self, call: Call, seconds: float) -> None:
        """Adds an exchange; ``call`` says of which layer and what kind."""
        key = call.layer, call.kind
        self.seconds[key] = self.seconds.get(key, 0.0) + seconds

    def gradient_arrived(self, parameter: Tensor) -> None:
        """For ``register_post_accumulate_grad_hook``."""
        self.last_gradient = time.perf_counter()

    def total(self) -> float:
        """Seconds in exchanges of all layers."""
        return sum(self.seconds.values())


@contextmanager
def record_exchanges(times: ExchangeTimes, model: nn.Module) -> Iterator[None]:
    """Adds each exchange, and the arrival of each of ``model``'s gradients, to ``times`` while the block runs."""
    hooks = [
        p.register_post_accumulate_grad_hook(times.gradient_arrived)  # type: ignore[no-untyped-call]
        for p in model.parameters()
        if p.requires_grad
    ]
    observers.append(times.add)
    try:
        yield
    finally:
        observers.remove(times.add)
        for hook in hooks:
            hook.remove()
