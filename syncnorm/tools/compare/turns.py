"""Times a training step of each arm. The arms take turns, so that a slow moment of the machine slows all of them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import fmean, median
from typing import NamedTuple, TypeVar

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from syncnorm.tools.common.ranks import Ranks
from syncnorm.tools.common.stats import median_interval
from syncnorm.tools.common.timing import ExchangeTimes, record_exchanges, rotated
from syncnorm.tools.compare.records import StepRatio, StepTime
from syncnorm.tools.compare.training import Trainer

BASELINE = "ddp"
# Of each turn the first step, in which the caches belong to another arm, is not counted.
STEPS_PER_TURN = 3
# Fewer than 6 have no 95 % interval of the median.
MIN_ROUNDS, MAX_ROUNDS = 6, 40
# The time that is aimed at, unless the fewest rounds take longer: a share of that of the training, within limits.
SHARE, MIN_SECONDS, MAX_SECONDS = 0.2, 2.0, 12.0

T = TypeVar("T")


class TimedStep(NamedTuple):
    """Seconds of one step of one rank: the whole, and the waiting in it."""

    seconds: float
    norm: float
    ddp: float


# Arm -> round -> steps.
Rounds = Mapping[str, Sequence[Sequence[TimedStep]]]


def time_in_turns(
    trainers: Mapping[str, Trainer | None], ranks: Ranks, training_seconds: float
) -> dict[str, tuple[StepTime, StepRatio | None]]:
    """The time of a step of each arm, and its ratio to that of ``ddp``, on rank 0; other ranks get nothing.

    The steps change the models.

    Args:
        trainers: by the name of the arm; ``None`` on a rank that does not take part in it.
        ranks: all ranks.
        training_seconds: how long the training took.

    Collective: all ranks, with the same arms in the same order.
    """
    rounds: dict[str, list[list[TimedStep]]] = {name: [] for name in trainers}
    started, planned, done = time.perf_counter(), MIN_ROUNDS, 0
    while done < planned:
        for name in rotated(list(trainers), done):
            if trainer := trainers[name]:
                rounds[name].append(_turn(trainer))
            ranks.wait()
        done += 1
        if done == 1:
            available = min(MAX_SECONDS, max(MIN_SECONDS, SHARE * training_seconds))
            possible = int(available / (time.perf_counter() - started))
            planned = ranks.share(min(MAX_ROUNDS, max(MIN_ROUNDS, possible)))
    by_rank: list[Rounds] = ranks.collect(rounds)
    if ranks.rank:
        return {}
    steps = {name: _mean_over_ranks([each[name] for each in by_rank if each[name]]) for name in trainers}
    seconds = {name: [median(step.seconds for step in turn) for turn in turns] for name, turns in steps.items()}
    is_gpu = ranks.device.type == "cuda"
    return {
        name: (
            _step_time([step for turn in turns for step in turn], is_gpu),
            _ratio(seconds[name], seconds[BASELINE]) if BASELINE in seconds else None,
        )
        for name, turns in steps.items()
    }


def _turn(trainer: Trainer) -> list[TimedStep]:
    with _observed(trainer.wrapper, trainer.model) as waiting:
        steps = []
        for _ in range(1 + STEPS_PER_TURN):
            waiting.reset()
            times = trainer.step()
            steps.append(TimedStep(times.seconds, *waiting.until(times.backward_done)))
    return steps[1:]


class _Waiting:
    """What a rank waits for in one step: in the exchanges of norm layers, and in DDP before and after the model."""

    def __init__(self, is_ddp: bool) -> None:
        self.exchanges = ExchangeTimes()
        self._is_ddp = is_ddp
        self.reset()

    def reset(self) -> None:
        self.exchanges.seconds.clear()
        self.exchanges.last_gradient = 0.0
        self._entered = self._before_forward = 0.0

    def enter_wrapper(self, *_: object) -> None:
        self._entered = time.perf_counter()

    def enter_module(self, *_: object) -> None:
        self._before_forward += time.perf_counter() - self._entered

    def until(self, backward_done: float) -> tuple[float, float]:
        """(norm, ddp) seconds of a step whose backward ended at ``backward_done``."""
        last_gradient = self.exchanges.last_gradient
        waits = self._is_ddp and last_gradient > 0
        after_backward = max(0.0, backward_done - last_gradient) if waits else 0.0
        return self.exchanges.total(), self._before_forward + after_backward


@contextmanager
def _observed(wrapper: nn.Module, model: nn.Module) -> Iterator[_Waiting]:
    # A step that trains several networks has a DDP around each.
    wrapped = [each for each in wrapper.modules() if isinstance(each, DistributedDataParallel)]
    waiting = _Waiting(is_ddp=bool(wrapped))
    hooks = [each.register_forward_pre_hook(waiting.enter_wrapper) for each in wrapped]
    hooks += [each.module.register_forward_pre_hook(waiting.enter_module) for each in wrapped]
    try:
        with record_exchanges(waiting.exchanges, model):
            yield waiting
    finally:
        for hook in hooks:
            hook.remove()


def _mean_over_ranks(by_rank: Sequence[Sequence[Sequence[TimedStep]]]) -> list[list[TimedStep]]:
    return [
        [TimedStep(*map(fmean, zip(*same_step, strict=True))) for same_step in zip(*same_turn, strict=True)]
        for same_turn in zip(*by_rank, strict=True)
    ]


def _step_time(steps: Sequence[TimedStep], is_gpu: bool) -> StepTime:
    """Means over the middle half of the steps, so that the parts add up to the whole."""
    ordered = sorted(steps)
    cut = len(ordered) // 4
    whole, norm, ddp = map(fmean, zip(*ordered[cut : len(ordered) - cut], strict=True))
    return StepTime(whole) if is_gpu else StepTime(whole, norm, ddp)


def _ratio(seconds: Sequence[float], baseline: Sequence[float]) -> StepRatio:
    ratios = [a / b for a, b in zip(seconds, baseline, strict=True)]
    return StepRatio(median(ratios), *median_interval(ratios), len(ratios))
