"""The measurements of an arm, each against a known value."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from syncnorm.monitor.divergence import rank_divergence
from syncnorm.testing import run_ranks
from syncnorm.tools.common.data import Batches
from syncnorm.tools.common.ranks import initialized_ranks
from syncnorm.tools.compare.evaluation import evaluate
from syncnorm.tools.compare.measurements import (
    DIVERGENCE_STEPS,
    CollectiveRecorder,
    measure_divergence,
    median_step,
    watch_memory,
)
from syncnorm.tools.compare.problem import Problem
from syncnorm.tools.compare.runner import make_settings
from syncnorm.tools.compare.training import curve


def _rank_known_collectives():
    ours, all_of_them = torch.ones(3), [torch.empty(3) for _ in range(2)]
    with CollectiveRecorder() as recorder:
        dist.all_gather(all_of_them, ours)
        dist.all_reduce(torch.ones(5, dtype=torch.float64))
        dist.all_reduce(torch.ones(1, dtype=torch.float64))
        dist.broadcast(torch.ones(7, dtype=torch.uint8), src=0)
    return [(c.op, c.origin, c.calls, c.payload_bytes) for c in recorder.counts()]


def test_recorder_counts_calls_and_bytes():
    expected = [("all_gather", "ddp", 1, 12), ("all_reduce", "ddp", 2, 48), ("broadcast", "ddp", 1, 7)]
    assert run_ranks(_rank_known_collectives) == [expected, expected]


def test_memory_includes_temporary_allocations():
    held = torch.ones(10 * 2**20)
    peak = watch_memory(torch.device("cpu"))
    if peak() is None:
        pytest.skip("this system does not report peak memory")
    torch.ones(20 * 2**20)  # 80 MiB, freed immediately
    assert 70 * 2**20 < peak().peak_bytes < 200 * 2**20
    del held


def _rank_divergence_of_a_known_layer():
    rank = dist.get_rank()
    data = [
        (torch.randn(3, 5, generator=torch.Generator().manual_seed(i)) * (i + 1), i)
        for i in range(8 * DIVERGENCE_STEPS)
    ]
    mine, whole = (Batches(data, 8, part, seed=0) for part in (slice(4 * rank, 4 * rank + 4), slice(0, 8)))
    with initialized_ranks(torch.device("cpu")) as ranks:
        model = nn.Sequential(nn.BatchNorm1d(3))
        [found] = measure_divergence(model, ["0"], lambda: model(mine.next()[0]), ranks)
    expected = []
    for _ in range(DIVERGENCE_STEPS):
        halves = whole.next()[0].double().chunk(2)
        moments = [torch.var_mean(half, (0, 2), correction=0) for half in halves]
        means, variances = torch.stack([m for _, m in moments]), torch.stack([v for v, _ in moments])
        expected.append(rank_divergence(means, variances, torch.tensor([1, 1])))
    return found, torch.tensor(expected).double().square().mean(0).sqrt().tolist()


def test_divergence_of_a_layer_against_both_halves_by_hand():
    for found, expected in run_ranks(_rank_divergence_of_a_known_layer):
        assert [found.mean, found.var] == pytest.approx(expected)


@pytest.mark.parametrize(("seconds", "expected"), [([9], 9), ([9, 1], 5), ([9, 1, 1], 1), ([9] * 5 + [2] * 15, 2)])
def test_median_step_excludes_warm_up(seconds, expected):
    assert median_step(seconds) == expected


def evaluated(model, x, y, metric, loss=F.cross_entropy):
    problem = Problem.of(loss=loss, metric=metric)
    settings = make_settings(batch_per_rank=1)
    return evaluate(model, problem, list(zip(x, y, strict=True)), settings, torch.device("cpu"), with_units=True)


def test_evaluation_of_classes_by_pixel():
    def logits(x):
        return torch.stack([x, -x], 1)  # class 0 where x is positive

    model = nn.Module()
    model.forward = logits
    x = torch.tensor([[[1.0, -1.0], [2.0, -3.0]]])
    y = torch.tensor([[[0, 1], [1, 1]]])
    found = evaluated(model, x, y, "accuracy")
    assert found.metric == 0.75
    assert found.loss == pytest.approx(float(F.cross_entropy(logits(x), y)))
    assert found.units == "0.75 "
    of_loss = evaluated(model, x, y, "loss")
    assert of_loss.metric == of_loss.loss == found.loss
    for ignored in (-100, 255):
        partly = torch.where(x > 0, y, ignored)  # one correct, one wrong, two that the loss ignores
        loss = partial(F.cross_entropy, ignore_index=ignored)
        assert evaluated(model, x, partly, "accuracy", loss).metric == 0.5


def test_learning_curve_is_the_mean_of_intervals():
    assert [(p.step, p.value) for p in curve([1.0, 3.0, 5.0, 9.0], max_points=2)] == [(2, 2.0), (4, 7.0)]
    assert [p.value for p in curve([1.0, float("nan")])] == [1.0, None]
    assert len(curve([0.0] * 504)) == 50
