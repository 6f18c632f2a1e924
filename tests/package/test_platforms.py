"""Builds of torch and systems that no test runs on, as far as a process can pretend to be one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

WITHOUT_DISTRIBUTED = """
import importlib.abc
import sys

class RemoveDistributed(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "torch.distributed":  # which looks for the first one to learn whether it was built
            for function in ("_c10d_init", "_rpc_init", "_dist_autograd_init", "_faulty_agent_init"):
                vars(sys.modules["torch._C"]).pop(function, None)

sys.meta_path.insert(0, RemoveDistributed())
import torch
assert not torch.distributed.is_available()
"""

WINDOWS = """
import ctypes
import os
import sys
import torch
sys.modules["fcntl"] = None
del os.register_at_fork, os.memfd_create, os.sched_yield
sys.platform = "win32"
class OfWindows(ctypes.CDLL):
    def __init__(self, name, *args, **kwargs):
        if name is None:
            raise TypeError("bad argument type for built-in operation")
        super().__init__(name, *args, **kwargs)
ctypes.CDLL = OfWindows
os.environ["SYNCNORM_NATIVE"] = "0"
"""

USE = """
import copy
import pickle
from torch import nn
import syncnorm

torch.manual_seed(0)
plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
synced = syncnorm.convert(copy.deepcopy(plain))
x = torch.randn(2, 3, 8, 8)
for model in (plain, synced):
    model(x).square().sum().backward()
torch.testing.assert_close(synced.eval()(x), plain.eval()(x))
torch.testing.assert_close(synced[0].weight.grad, plain[0].weight.grad)
assert len(list(syncnorm.describe(synced))) == 1
pickle.loads(pickle.dumps(synced))
assert type(syncnorm.revert(synced)[1]) is nn.BatchNorm2d
from syncnorm.tools.env import environment
print(environment())
from syncnorm.tools.compare.measurements import watch_memory
watch_memory(torch.device("cpu"))()
"""


@pytest.mark.parametrize("system", [WITHOUT_DISTRIBUTED, WINDOWS], ids=["without torch.distributed", "Windows"])
def test_one_process_trains_evaluates_and_converts(system):
    pytest.importorskip("accelerate")
    done = subprocess.run(
        [sys.executable, "-c", system + USE],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "syncnorm: " in done.stdout
