"""How long ranks stand still for each other: in the norm layers' exchanges over gloo, and in DDP's."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from syncnorm.tools.common.ranks import Ranks
from syncnorm.tools.common.timing import ExchangeTimes, record_exchanges
from syncnorm.tools.compare.evidence import Wait

STEPS = 5


class StepTimes(NamedTuple):
    """Seconds that a training step took, and when its backward ended."""

    seconds: float
    backward_done: float


def measure_wait(step: Callable[[], StepTimes], wrapper: nn.Module, model: nn.Module, ranks: Ranks) -> Wait:
    """The wait in some training steps of ``wrapper``, a DistributedDataParallel around ``model``.

    Collective: all ranks; those of the steps, and one object gather.
    """
    noted, entered, ddp, total = ExchangeTimes(), 0.0, 0.0, 0.0

    def enter(*_: Any) -> None:
        nonlocal entered
        entered = time.perf_counter()

    def begin(*_: Any) -> None:
        nonlocal ddp
        ddp += time.perf_counter() - entered

    hooks = [wrapper.register_forward_pre_hook(enter), model.register_forward_pre_hook(begin)]
    try:
        with record_exchanges(noted, model):
            for _ in range(STEPS):
                times = step()
                ddp += max(0.0, times.backward_done - noted.last_gradient)
                total += times.seconds
    finally:
        for hook in hooks:
            hook.remove()
    everywhere = ranks.collect((noted.total(), ddp, total))
    return Wait(*(sum(each) / (STEPS * len(everywhere)) for each in zip(*everywhere, strict=True)))
