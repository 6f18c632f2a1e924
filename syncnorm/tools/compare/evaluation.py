"""The result of a model on the test data: the loss, the metric, and the metric of each unit."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from syncnorm.errors import InputError
from syncnorm.tools.common.data import in_order, to_device
from syncnorm.tools.common.units import encode
from syncnorm.tools.compare.metrics import Metric, Tally, remembered
from syncnorm.tools.compare.problem import Problem
from syncnorm.tools.compare.records import CompareSettings


@dataclass(frozen=True)
class Evaluation:
    """Results of a model; a value is ``None`` if it is not finite.

    Attributes:
        metric: of the test data.
        loss: the mean over the samples; ``None`` too if the model has no loss in eval mode.
        units: as in `SeedResult.units`.
    """

    metric: float | None
    loss: float | None
    units: str = ""


@torch.no_grad()
def evaluate(
    model: nn.Module,
    problem: Problem,
    data: Any,
    settings: CompareSettings,
    device: torch.device,
    with_units: bool = False,
) -> Evaluation:
    """Tests ``model``, in eval mode, without communication; ``with_units`` for a final result."""
    model.eval()
    metric = problem.metric
    assert metric is not None
    num_batches = math.ceil(len(data) / settings.eval_batch)
    tally = None if metric.is_loss else metric.tally(num_batches, with_units)
    losses: list[tuple[int, float]] = []
    for count, batch in in_order(data, settings.eval_batch, problem.collate):
        batch = to_device(batch, device)
        with remembered(model), autocast(settings.amp, device):
            if problem.has_test_loss:
                losses.append((count, float(problem.loss_of(model, batch))))
            if tally is not None:
                tally.update(model, batch)
    samples = sum(count for count, _ in losses)
    loss = sum(count * value for count, value in losses) / samples if losses else math.nan
    mean = loss if math.isfinite(loss) else None
    if tally is None:
        units = encode([value for _, value in losses]) if with_units and mean is not None else ""
        return Evaluation(mean, mean, units)
    return Evaluation(_result(metric, tally, len(data)), mean, encode(tally.units()) if with_units else "")


def _result(metric: Metric, tally: Tally, num_samples: int) -> float | None:
    """The metric of the test data, which may break what it promised for the few samples of its trial."""
    result = tally.result()
    if metric.share and result is not None and not 0 <= result <= 1:
        raise InputError(f"the metric {metric.name} is {result:g}: expected between 0 and 1, as share says")
    if not metric.accumulates and len(tally.units()) != num_samples:
        raise InputError(
            f"the metric {metric.name} returned {len(tally.units())} values for {num_samples} test samples: expected "
            f"one for each sample"
        )
    return result


def autocast(amp: str, device: torch.device) -> AbstractContextManager[Any]:
    """The dtype called ``amp`` for matrix products and convolutions; full precision if it is empty."""
    return torch.autocast(device.type, getattr(torch, amp)) if amp else nullcontext()
