"""The spread of statistics between ranks."""

from math import isnan, sqrt

import pytest
import torch
from torch import Tensor

from syncnorm.monitor.divergence import spread


def statistics(parts: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Of (values, C) on each rank."""
    means = torch.stack([p.double().mean(0) for p in parts])
    variances = torch.stack([p.double().var(0, correction=0) for p in parts])
    return means, variances, torch.tensor([len(p) for p in parts])


def test_ranks_that_hold_the_same_have_no_spread():
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    found = spread(*statistics([x, x]))
    assert found.mean == pytest.approx(0, abs=1e-12)
    assert found.var == pytest.approx(0, abs=1e-12)


def test_means_apart_are_told_in_standard_deviations_of_the_whole():
    x = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = (x - x.mean(0)) / x.std(0, correction=0) * 5  # whatever the scale
    found = spread(*statistics([x + 10, x - 10]))
    assert found.mean == pytest.approx(10 / sqrt(125))
    assert found.var == pytest.approx(1 - 25 / 125)


def test_samples_of_one_distribution_spread_as_theory_says():
    x = torch.randn(2, 64, 5000, generator=torch.Generator().manual_seed(0))
    found = spread(*statistics(list(x)))
    # Of n independent values on each of W ranks: sqrt((W - 1) / W / n), and sqrt(2) of it for a normal's variance.
    assert found.mean == pytest.approx(sqrt(1 / 2 / 64), rel=0.05)
    assert found.var == pytest.approx(sqrt(2 / 2 / 64), rel=0.05)


def test_an_empty_rank_says_nothing_and_a_small_one_little():
    x = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0))
    means, variances, counts = statistics([x[:900], x[900:]])
    nan = torch.full((1, 2), torch.nan)
    with_empty = spread(torch.cat([means, nan]), torch.cat([variances, nan]), torch.cat([counts, torch.tensor([0])]))
    assert with_empty == spread(means, variances, counts)
    assert spread(means, variances, counts).mean < spread(means, variances, counts.flip(0)).mean * 1.01


def test_channels_that_never_vary_are_left_out():
    x = torch.randn(100, 2, generator=torch.Generator().manual_seed(0))
    dead = torch.cat([x, torch.full((100, 1), 7.0)], 1)
    assert spread(*statistics(list(dead.split(50)))) == spread(*statistics(list(x.split(50))))
    assert isnan(spread(*statistics([dead[:50, 2:], dead[50:, 2:]])).mean)
