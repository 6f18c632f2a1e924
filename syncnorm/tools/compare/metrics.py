"""By what models are judged: the user's metric or one of ours, and the values of single test samples behind it.

A decision needs more than the result of the whole test set: how much it depends on which samples are in it. A metric
per sample has a value for each. For a metric of the whole set, such as mean IoU, the test batches are dealt into
`GROUPS` groups, and the metric without each group gives the jackknife's pseudo-values: ``G M - (G - 1) M_without_g``,
whose mean over the groups is about M. Source: Tukey, "Bias and confidence in not-quite large samples", 1958; Shao and
Tu, "The Jackknife and Bootstrap", 1995, section 2.3 (groups).
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import update_wrapper
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from syncnorm.errors import InputError
from syncnorm.tools.common.data import seed_everything
from syncnorm.tools.compare.records import MetricInfo
from syncnorm.tools.compare.steps import networks

GROUPS = 20


class Accumulator(Protocol):
    """A metric of the whole test set. It may also have ``units() -> list[float]``, a value for each sample."""

    def update(self, model: Any, batch: Any) -> None:
        """Adds a batch; ``model`` is in eval mode."""

    def compute(self) -> Any:
        """The result: a number, or a tensor with one element."""


@dataclass(frozen=True)
class Metric:
    """How good a trained model is.

    Attributes:
        measure: (model, batch) -> values (N,), one for each sample of the batch, whose mean is the result; or a class
            or function without arguments that returns an `Accumulator`. ``model`` is in eval mode and without
            gradients; equal calls of it in one batch are computed once.
        name: to print.
        higher_is_better: the direction.
        share: whether values are between 0 and 1, to be shown as percentages.

    Example:
        >>> def right(model, batch):
        ...     return (model(batch[0]).argmax(1) == batch[1]).float()
        >>> Metric(right, "accuracy", share=True).info.units
        'samples'
    """

    measure: Callable[..., Any]
    name: str
    higher_is_better: bool = True
    share: bool = False

    @property
    def info(self) -> MetricInfo:
        """What the record says of it."""
        if self.is_loss:
            units = "batches"
        else:
            units = "samples" if not self.accumulates or hasattr(self.measure(), "units") else "groups"
        return MetricInfo(self.name, self.higher_is_better, self.share, units)

    @property
    def is_loss(self) -> bool:
        """Whether the result is the loss, which is computed in any case."""
        return self.measure is _loss_itself

    @property
    def accumulates(self) -> bool:
        """Whether ``measure`` returns an `Accumulator`."""
        return num_required(self.measure) == 0

    def tally(self, num_batches: int, with_units: bool) -> Tally:
        """A new result, for ``num_batches`` test batches; ``with_units`` to get values of units too."""
        if not self.accumulates:
            return Tally([_PerSample(self)])
        first = _of_this_rank(self.measure())
        groups = min(GROUPS, num_batches)
        # Without the only group there is nothing to measure.
        if not with_units or groups < 2 or hasattr(first, "units"):
            return Tally([first])
        return Tally([first, *(_of_this_rank(self.measure()) for _ in range(groups))])


def _of_this_rank(accumulator: Any) -> Any:
    """``accumulator``, in which no metric of torchmetrics gathers over ranks: only rank 0 tests, and would wait."""
    if "torchmetrics" not in sys.modules:
        return accumulator
    of_torchmetrics = sys.modules["torchmetrics"].Metric
    for part in (accumulator, *getattr(accumulator, "__dict__", {}).values()):
        for module in part.modules() if isinstance(part, nn.Module) else ():
            if isinstance(module, of_torchmetrics):
                module.sync_on_compute = module._to_sync = False
    return accumulator


def _loss_itself() -> None:
    raise AssertionError("the loss is computed without a metric")


LOSS = Metric(_loss_itself, "loss", higher_is_better=False)


def num_required(function: Callable[..., Any]) -> int:
    """How many arguments ``function`` needs."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    return sum(p.kind in kinds and p.default is p.empty for p in parameters)


def as_metric(given: Any, name: str) -> Metric:
    """The user's metric: a `Metric`, or a function or class with attributes of the same names.

    Raises:
        InputError: it does not say its direction, or takes arguments that we do not have.
    """
    if isinstance(given, Metric):
        return given
    direction = getattr(given, "higher_is_better", None)
    if direction is None:
        raise InputError(
            f"the metric {name} does not say its direction: set {name.rpartition(':')[2]}.higher_is_better to True "
            f"or False, or give a syncnorm.compare.Metric"
        )
    if num_required(given) not in (0, 2):
        raise InputError(
            f"the metric {name} takes {num_required(given)} arguments: expected (model, batch), which returns a "
            f"value for each sample, or none, which returns an object with update(model, batch) and compute()"
        )
    shown = getattr(given, "name", None) or getattr(given, "__name__", name)
    return Metric(given, str(shown), bool(direction), bool(getattr(given, "share", False)))


class Tally:
    """The metric of one model: the first accumulator has every batch, each further one lacks those of a group."""

    def __init__(self, accumulators: list[Any]) -> None:
        self._whole, *self._without = accumulators
        self._count = 0

    def update(self, model: nn.Module, batch: Any) -> None:
        """Adds a batch to all accumulators but that of its group."""
        for group, accumulator in enumerate((self._whole, *self._without), start=-1):
            if group < 0 or self._count % len(self._without) != group:
                seed_everything(self._count)  # a metric that draws noise draws the same in each accumulator
                accumulator.update(model, batch)
        self._count += 1

    def result(self) -> float | None:
        """The metric of all batches; ``None`` if it is not finite."""
        return _finite(self._whole.compute())

    def units(self) -> list[float]:
        """A value for each sample or group; empty if there is none, or if one is not finite."""
        if hasattr(self._whole, "units"):
            return [float(value) for value in self._whole.units()]
        whole, rest = self.result(), [_finite(each.compute()) for each in self._without]
        values = [value for value in rest if value is not None]
        if whole is None or len(rest) < 2 or len(values) < len(rest):
            return []
        return [len(rest) * whole - (len(rest) - 1) * value for value in values]


def _finite(value: Any) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None


class _PerSample:
    """The mean of values per sample."""

    def __init__(self, metric: Metric) -> None:
        self._metric = metric
        self._values: list[float] = []

    def update(self, model: nn.Module, batch: Any) -> None:
        values = self._metric.measure(model, batch)
        if not isinstance(values, Tensor):
            values = torch.as_tensor(values)
        self._values += values.double().flatten().tolist()

    def compute(self) -> float:
        return sum(self._values) / len(self._values)

    def units(self) -> list[float]:
        return self._values


@contextmanager
def remembered(model: nn.Module) -> Iterator[None]:
    """Inside the block, a network of ``model`` that is called again with equal arguments returns the same output.

    A model in eval mode is a function of its arguments. Loss, metric and the jackknife's groups all ask for the same.
    """
    called = networks(model)
    own = [vars(network).get("forward") for network in called]
    for network in called:
        network.forward = _Remembering(network.forward)
    try:
        yield
    finally:
        for network, before in zip(called, own, strict=True):
            del network.forward
            if before is not None:
                network.forward = before


class _Remembering:
    def __init__(self, forward: Callable[..., Any]) -> None:
        update_wrapper(self, forward)
        self._forward = forward
        self._calls: list[tuple[Any, Any]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for arguments, output in self._calls:
            if _equal(arguments, (args, kwargs)):
                return output
        output = self._forward(*args, **kwargs)
        self._calls.append(((args, kwargs), output))
        return output


def _equal(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(value, b[key]) for key, value in a.items())
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(_equal, a, b))
    return isinstance(a, bool | int | float | str) and bool(a == b)
