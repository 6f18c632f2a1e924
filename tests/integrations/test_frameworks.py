"""The plugin and the callback pass their arguments to convert; tests/launch/test_examples.py trains with them."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch.distributed as dist
from shims.torchvision_operators import make_torchvision_importable
from torch import nn

import syncnorm
from syncnorm.testing import run_ranks

SHIMS = Path(__file__).parents[1] / "support" / "shims"
pytestmark = pytest.mark.timeout(300)  # importing these frameworks takes long


def needs(package: str) -> None:
    """Skips the test if the package is missing; does not import it."""
    if find_spec(package) is None:
        pytest.skip(f"no {package}: pip install '.[examples]'")


def build() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


def group_size_between(convert, revert) -> int:
    """The size of the group of the layer that ``convert`` makes synced and ``revert`` makes plain again, in place."""
    model = build()
    convert(model)
    assert isinstance(model[1], syncnorm.SyncBatchNorm2d)
    size = dist.get_world_size(model[1].process_group)
    revert(model)
    assert type(model[1]) is nn.BatchNorm2d
    return size


def _rank_lightning(options) -> int:
    make_torchvision_importable()
    from syncnorm.integrations.lightning import SyncNorm

    plugin = SyncNorm(**options)
    return group_size_between(plugin.apply, plugin.revert)


def _rank_huggingface(options) -> int:
    make_torchvision_importable()
    from syncnorm.integrations.huggingface import SyncNorm

    callback = SyncNorm(**options)
    return group_size_between(
        lambda model: callback.on_train_begin(None, None, None, model=model),
        lambda model: callback.on_train_end(None, None, None, model=model),
    )


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"group_size": 1}], ids=str)
@pytest.mark.parametrize(
    ("rank_function", "package"), [(_rank_lightning, "lightning"), (_rank_huggingface, "transformers")]
)
def test_it_converts_with_its_arguments_and_reverts(rank_function, package, options):
    needs(package)
    assert run_ranks(rank_function, 2, (options,), timeout=140) == [options.get("group_size", 2)] * 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lightning", "pytorch_lightning"])
def test_the_trainer_of_either_name_of_lightning_accepts_the_plugin(name):
    needs(name)
    code = (
        f"import {name} as L; from syncnorm.integrations.lightning import SyncNorm; "
        "L.Trainer(accelerator='cpu', devices=2, strategy='ddp', plugins=[SyncNorm(group_size=2)], logger=False)"
    )
    path = os.pathsep.join((str(SHIMS), os.environ.get("PYTHONPATH", "")))
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr
