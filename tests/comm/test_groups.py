"""Groups of ranks that share statistics."""

import os

import pytest
import torch
import torch.distributed as dist
from torch import nn

import syncnorm
from syncnorm.comm import process_groups
from syncnorm.testing import RankError, run_ranks


def _rank_means_by_group_size(size: int | str) -> float:
    if size == "node":
        os.environ["GROUP_RANK"] = str(dist.get_rank() // 2)
    model = syncnorm.convert(nn.Sequential(nn.BatchNorm1d(2, momentum=1.0)), group_size=size)
    model(torch.full((3, 2), float(dist.get_rank())))
    assert process_groups.subgroup(size) is process_groups.subgroup(size)  # created once
    assert model[0].process_group is process_groups.subgroup(size)
    return model[0].running_mean[0].item()


@pytest.mark.parametrize(
    ("world", "size", "means"),
    [
        (2, 1, [0.0, 1.0]),
        (2, 2, [0.5, 0.5]),
        (3, 3, [1.0, 1.0, 1.0]),
        (4, 2, [0.5, 0.5, 2.5, 2.5]),
        (3, "node", [0.5, 0.5, 2.0]),
    ],
)
def test_group_size(world, size, means):
    assert run_ranks(_rank_means_by_group_size, world, (size,)) == pytest.approx(means)


@pytest.mark.parametrize("size", [2, 0, -1, True, "rack"])
def test_a_size_that_does_not_divide_the_world(size):
    with pytest.raises(RankError, match=r"group_size=.* does not divide the 3 ranks; use one of \[1, 3\]"):
        run_ranks(_rank_means_by_group_size, 3, (size,))


def test_groups_are_created_again_for_a_new_default_group():
    for _ in range(2):  # each call creates a new default group in the same processes
        assert run_ranks(_rank_means_by_group_size, 2, (2,)) == [0.5, 0.5]
