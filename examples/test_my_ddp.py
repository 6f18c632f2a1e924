"""How to test your own DDP code on a CPU, with the pytest plugin that is installed with syncnorm.

What it shows: ``run_ranks`` and ``assert_matches_single_process``: real gloo ranks in pytest, kept between tests.
How to start:  pytest examples/test_my_ddp.py   # or with -n auto, under pytest-xdist
What it prints: pytest's summary; if a rank raises, its test fails with the traceback of the rank.
Needs: pytest, scikit-learn. Copy the file and replace ``build_model`` and ``train`` by your own.
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
    """The code under test: each rank trains on its own rows of each batch. Returns the state dict."""
    model = syncnorm.convert(build_model()) if sync else build_model()
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05)
    for rows in torch.arange(len(IMAGES)).split(batch):
        rows = rows[dist.get_rank() :: dist.get_world_size()]
        optimizer.zero_grad()
        F.cross_entropy(ddp(IMAGES[rows]), LABELS[rows]).backward()
        optimizer.step()
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_two_ranks_train_like_one(run_ranks):
    """Compares the whole training of one rank on the whole batch with that of two ranks on half of it each."""
    (want,) = run_ranks(train, 1, (True,))
    for got in run_ranks(train, 2, (True,)):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)


def test_ranks_agree_to_the_last_bit(run_ranks):
    """Weights and running statistics are the same on both ranks; DDP alone guarantees only the former."""
    first, second = run_ranks(train, 2, (True,))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_without_syncing_the_statistics_drift_apart(run_ranks):
    """The test above can fail: it does with local batch norm."""
    first, second = run_ranks(train, 2, (False,))
    assert torch.equal(first["0.weight"], second["0.weight"])
    assert not torch.equal(first["1.running_mean"], second["1.running_mean"])


@pytest.mark.parametrize("splits", [[4, 4], [7, 1], [8, 0]], ids=str)
def test_the_model_on_uneven_ranks(assert_matches_single_process, splits):
    """Compares outputs, gradients, weights and buffers of two steps with fp64 on the whole batch."""
    assert_matches_single_process(build_model, IMAGES[:8], world_size=2, splits=splits, steps=2)
