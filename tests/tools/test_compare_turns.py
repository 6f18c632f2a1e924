"""The timing of the arms in turn, and adding seeds until the results decide."""

import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import records
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from syncnorm.testing import run_ranks
from syncnorm.tools.common.ranks import initialized_ranks
from syncnorm.tools.common.stats import median_interval
from syncnorm.tools.compare import seeds
from syncnorm.tools.compare.paired import decide
from syncnorm.tools.compare.training import StepTimes
from syncnorm.tools.compare.turns import time_in_turns


class Slow(nn.Linear):
    """A layer that takes ``seconds`` on rank 1, and no time on rank 0."""

    def __init__(self, seconds):
        super().__init__(2, 2)
        self.seconds = seconds

    def forward(self, x):
        time.sleep(self.seconds * dist.get_rank())
        return super().forward(x)


def _trainer(model, wrapper):
    def step():
        started = time.perf_counter()
        wrapper(torch.ones(1, 2)).sum().backward()
        now = time.perf_counter()
        return StepTimes(now - started, now)

    return SimpleNamespace(model=model, wrapper=wrapper, step=step)


def _rank_time_arms():
    trainers = {}
    for name, seconds in (("ddp", 0.02), ("ddp+syncbn", 0.04)):
        model = Slow(seconds)
        trainers[name] = _trainer(model, DistributedDataParallel(model))
    alone = nn.Linear(2, 2)
    trainers["single"] = _trainer(alone, alone) if dist.get_rank() == 0 else None
    with initialized_ranks(torch.device("cpu")) as ranks:
        return time_in_turns(trainers, ranks, 1.0)


@pytest.fixture(scope="module")
def timed():
    found, nothing = run_ranks(_rank_time_arms)
    assert nothing == {}
    return found


def test_a_rank_waits_in_ddp_for_one_that_is_late(timed):
    step, _ = timed["ddp"]
    # Rank 1 works for 20 ms and rank 0 waits as long: half each, as a mean over ranks.
    assert step.ddp_seconds == pytest.approx(0.010, abs=0.004)
    assert step.work_seconds == pytest.approx(0.010, abs=0.004)
    assert step.norm_seconds == 0


def test_the_cost_is_a_ratio_with_an_interval(timed):
    _, cost = timed["ddp+syncbn"]
    assert cost.ratio == pytest.approx(2, rel=0.25)
    assert cost.low <= cost.ratio <= cost.high
    assert timed["ddp"][1].ratio == 1
    assert timed["single"][1].high < 0.5


@pytest.mark.parametrize(("number", "inner"), [(6, (1, 6)), (9, (2, 8)), (12, (3, 10)), (40, (14, 27))])
def test_interval_of_a_median_by_order_statistics(number, inner):
    binom = pytest.importorskip("scipy.stats").binom
    low, high = median_interval(range(1, number + 1))
    assert (low, high) == inner
    assert 1 - 2 * binom.cdf(low - 1, number, 0.5) >= 0.95
    assert 1 - 2 * binom.cdf(low, number, 0.5) < 0.95


class _OneRank:
    rank = 0
    kept = 0

    def share(self, value):
        return value

    def keep(self, record):
        self.kept += 1


def _add_seeds(kinds, budget=1e9, first=7, seconds=0.0):
    """Runs the schedule on decisions that are ``kinds`` at the first look, the second, ..."""
    ranks, trained = _OneRank(), []
    settings = SimpleNamespace(seeds=(first,), budget_seconds=budget)

    def train(seed):
        trained.append(seed)
        time.sleep(seconds)

    def record(done, look):
        pairs = (("ddp", "single"), ("ddp+syncbn", "ddp"))
        at_this_look = zip(pairs, kinds[look - 1], strict=True)
        return SimpleNamespace(decisions=[SimpleNamespace(arm=a, other=b, kind=k) for (a, b), k in at_this_look])

    done, looks = seeds.run_seeds(train, record, settings, ranks)
    assert done == trained == list(range(first, first + len(done)))
    assert ranks.kept == len(done)
    return len(done), looks


UNDECIDED, DECIDED = ("undecided", "worse"), ("worse", "better")


@pytest.mark.parametrize(("undecided_looks", "expected"), [(0, (3, 1)), (1, (5, 2)), (3, (12, 4))])
def test_seeds_are_added_until_decided(undecided_looks, expected):
    assert _add_seeds([UNDECIDED] * undecided_looks + [DECIDED]) == expected


def test_the_budget_ends_it_and_the_first_seed_always_runs():
    assert _add_seeds([UNDECIDED] * 20, budget=1e-9) == (1, 1)
    done, _ = _add_seeds([UNDECIDED] * 20, budget=0.2, seconds=0.03)
    assert 3 <= done <= 6


def test_a_given_number_of_seeds_is_not_judged_meanwhile():
    ranks, settings = _OneRank(), SimpleNamespace(seeds=(0, 1), budget_seconds=None)
    done, looks = seeds.run_seeds(lambda seed: None, lambda done, look: None, settings, ranks)
    assert (done, looks, ranks.kept) == ([0, 1], 0, 2)


def test_several_looks_widen_the_interval():
    once = records.comparison()
    found = [
        decide(each, each["ddp"], each["single"]) for each in (once, replace(once, looks=1), replace(once, looks=3))
    ]
    assert [each.confidence for each in found] == [0.95, 0.975, 0.99375]
    assert found[0].low > found[1].low > found[2].low
