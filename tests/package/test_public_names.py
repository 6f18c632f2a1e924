"""Public names, signatures and state dicts are as documented, and the examples in docstrings run."""

import doctest
import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest
import torch
from shims.torchvision_operators import make_torchvision_importable
from torch import nn

import syncnorm

PACKAGE = Path(syncnorm.__file__).parent
FRAMEWORKS = {"syncnorm.integrations.lightning": "lightning", "syncnorm.integrations.huggingface": "transformers"}


def test_public_names():
    for name in syncnorm.__all__:
        assert hasattr(syncnorm, name), name
    assert list(inspect.signature(syncnorm.functional.sync_batch_norm).parameters)[:10] == [
        *inspect.signature(nn.functional.batch_norm).parameters,
        "process_group",
        "mask",
    ]
    assert callable(syncnorm.testing.run_ranks)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = syncnorm.nothing


@pytest.mark.parametrize("cls", [syncnorm.SyncBatchNorm, syncnorm.SyncBatchNorm1d, syncnorm.SyncBatchNorm2d])
def test_constructors_have_torchs_parameters(cls):
    ours, theirs = (list(inspect.signature(c).parameters) for c in (cls, nn.SyncBatchNorm))
    assert ours == theirs


def test_state_dict_moves_to_and_from_torchs_layers():
    for other in (nn.BatchNorm2d(4), nn.SyncBatchNorm(4)):
        ours = syncnorm.SyncBatchNorm2d(4)
        nn.init.uniform_(other.weight)
        ours.load_state_dict(other.state_dict())
        assert torch.equal(ours.weight, other.weight)
        other.load_state_dict(ours.state_dict())


@pytest.mark.parametrize(
    "name",
    [m.name for m in pkgutil.walk_packages([str(PACKAGE)], "syncnorm.") if not m.name.endswith("__main__")],
)
def test_docstring_examples_run(name):
    if name in FRAMEWORKS:
        make_torchvision_importable()  # which these frameworks import
        pytest.importorskip(FRAMEWORKS[name])
    module = importlib.import_module(name)
    found = doctest.testmod(module, extraglobs={"torch": torch, "nn": nn}, optionflags=doctest.ELLIPSIS)
    assert found.failed == 0


def test_torchs_sync_batch_norm_is_not_a_base_class():
    """DDP refuses instances of it on a CPU, including those of subclasses."""
    assert not issubclass(syncnorm.SyncBatchNorm, nn.SyncBatchNorm)
