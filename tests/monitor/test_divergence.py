"""The divergence of statistics between ranks."""

from math import isnan, sqrt

import pytest
import torch
from torch import Tensor

from syncnorm.monitor.divergence import rank_divergence


def statistics(parts: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Means, biased variances and counts of the (values, C) of each rank."""
    means = torch.stack([p.double().mean(0) for p in parts])
    variances = torch.stack([p.double().var(0, correction=0) for p in parts])
    return means, variances, torch.tensor([len(p) for p in parts])


def test_zero_for_equal_ranks():
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    found = rank_divergence(*statistics([x, x]))
    assert found.mean == pytest.approx(0, abs=1e-12)
    assert found.var == pytest.approx(0, abs=1e-12)


def test_the_unit_is_the_standard_deviation_of_the_global_batch():
    x = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = (x - x.mean(0)) / x.std(0, correction=0) * 5  # the scale does not matter
    found = rank_divergence(*statistics([x + 10, x - 10]))
    assert found.mean == pytest.approx(10 / sqrt(125))
    assert found.var == pytest.approx(1 - 25 / 125)


def test_independent_samples_diverge_as_theory_predicts():
    x = torch.randn(2, 64, 5000, generator=torch.Generator().manual_seed(0))
    found = rank_divergence(*statistics(list(x)))
    # n independent values on each of W ranks: sqrt((W - 1) / W / n), and for the variance of a normal distribution
    # sqrt(2) times as much.
    assert found.mean == pytest.approx(sqrt(1 / 2 / 64), rel=0.05)
    assert found.var == pytest.approx(sqrt(2 / 2 / 64), rel=0.05)


def test_ranks_are_weighted_by_their_counts():
    x = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0))
    means, variances, counts = statistics([x[:900], x[900:]])
    nan = torch.full((1, 2), torch.nan)
    with_empty = rank_divergence(
        torch.cat([means, nan]), torch.cat([variances, nan]), torch.cat([counts, torch.tensor([0])])
    )
    assert with_empty == rank_divergence(means, variances, counts)
    assert (
        rank_divergence(means, variances, counts).mean < rank_divergence(means, variances, counts.flip(0)).mean * 1.01
    )


def test_constant_channels_are_ignored():
    x = torch.randn(100, 2, generator=torch.Generator().manual_seed(0))
    dead = torch.cat([x, torch.full((100, 1), 7.0)], 1)
    assert rank_divergence(*statistics(list(dead.split(50)))) == rank_divergence(*statistics(list(x.split(50))))
    assert isnan(rank_divergence(*statistics([dead[:50, 2:], dead[50:, 2:]])).mean)
