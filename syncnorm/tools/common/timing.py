"""Timing: whose turn it is, and how much of a training step is spent in the exchanges of the norm layers."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, nn

from syncnorm.comm import Call, Kind
from syncnorm.comm.call import observing

T = TypeVar("T")


def synchronize(device: torch.device) -> None:
    """Waits until the device is idle, so that a clock read afterwards includes the work and not only its launch."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rotated(names: Sequence[T], repetition: int) -> list[T]:
    """``names`` in the order of this repetition: each is first equally often, and not always after the same one.

    Example:
        >>> [rotated("abc", r) for r in range(3)]
        [['a', 'b', 'c'], ['a', 'c', 'b'], ['b', 'c', 'a']]
    """
    start = repetition // 2 % len(names)
    order = [*names[start:], *names[:start]]
    return order if repetition % 2 == 0 else [order[0], *reversed(order[1:])]


@dataclass
class ExchangeTimes:
    """Seconds spent in exchanges by layer and kind, and the time at which the last gradient was accumulated."""

    seconds: dict[tuple[str, Kind], float] = field(default_factory=dict)
    last_gradient: float = 0.0

    def add(self, call: Call, seconds: float) -> None:
        """Adds an exchange of the layer and the kind that ``call`` names."""
        key = call.layer, call.kind
        self.seconds[key] = self.seconds.get(key, 0.0) + seconds

    def gradient_arrived(self, parameter: Tensor) -> None:
        """A hook for ``register_post_accumulate_grad_hook``."""
        self.last_gradient = time.perf_counter()

    def total(self) -> float:
        """Seconds spent in the exchanges of all layers."""
        return sum(self.seconds.values())


@contextmanager
def record_exchanges(times: ExchangeTimes, model: nn.Module) -> Iterator[None]:
    """Records in ``times`` every exchange and every gradient of ``model`` while the block runs."""
    hooks = [
        p.register_post_accumulate_grad_hook(times.gradient_arrived)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        for p in model.parameters()
        if p.requires_grad
    ]
    try:
        with observing(times.add):
            yield
    finally:
        for hook in hooks:
            hook.remove()
