"""Tests of one's own DDP code on a CPU, with the pytest plugin that syncnorm brings along.

What it shows: ``run_ranks`` and ``assert_matches_single_process``: real gloo ranks inside pytest, kept between tests.
How to start:  pytest examples/test_my_ddp.py   # or with -n auto, under pytest-xdist
What it prints: pytest's own summary; a rank that raises fails its test with that rank's traceback.
Needs: pytest, scikit-learn. Copy the file and put your own ``build_model`` and ``train`` in place of these two.
"""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import syncnorm

IMAGES, LABELS = (torch.tensor(array[:64]) for array in load_digits(return_X_y=True))
IMAGES = IMAGES.float().view(-1, 1, 8, 8) / 16


def build_model() -> nn.Module:
    """A small CNN; (N, 1, 8, 8) -> (N, 10)."""
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8)
    return nn.Sequential(conv, norm, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))


def train(sync: bool, batch: int = 8) -> dict[str, Tensor]:
    """The code under test: each rank trains on its own rows of each batch; returns the state dict."""
    model = syncnorm.convert(build_model()) if sync else build_model()
    ddp = DistributedDataParallel(model)
    optimiser = torch.optim.SGD(ddp.parameters(), lr=0.05)
    for rows in torch.arange(len(IMAGES)).split(batch):
        rows = rows[dist.get_rank() :: dist.get_world_size()]
        optimiser.zero_grad()
        F.cross_entropy(ddp(IMAGES[rows]), LABELS[rows]).backward()
        optimiser.step()
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_two_ranks_train_like_one(run_ranks):
    """The whole of the training: one rank with the whole batch against two with half of it each."""
    (want,) = run_ranks(train, 1, (True,))
    for got in run_ranks(train, 2, (True,)):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)


def test_ranks_agree_to_the_last_bit(run_ranks):
    """Weights and running statistics: what DDP alone does not promise of the latter."""
    first, second = run_ranks(train, 2, (True,))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_without_syncing_the_statistics_drift_apart(run_ranks):
    """The test above can fail: local batch norm fails it."""
    first, second = run_ranks(train, 2, (False,))
    assert torch.equal(first["0.weight"], second["0.weight"])
    assert not torch.equal(first["1.running_mean"], second["1.running_mean"])


@pytest.mark.parametrize("splits", [[4, 4], [7, 1], [8, 0]], ids=str)
def test_the_model_on_uneven_ranks(assert_matches_single_process, splits):
    """Outputs, gradients, weights and buffers of two steps against fp64 on the whole batch."""
    assert_matches_single_process(build_model, IMAGES[:8], world_size=2, splits=splits, steps=2)
