"""The module of a user, in which a layer has a name that is hard to print, and the environment of its commands."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
NETS = """
import os, signal, torch
from torch import nn
from torch.utils.data import TensorDataset


def build():
    parts = {"conv": nn.Conv2d(1, 8, 3), "[b]\u5c42$x_{$\u00e9": nn.BatchNorm2d(8), "pool": nn.AdaptiveAvgPool2d(1)}
    net = nn.Sequential()
    for name, part in (parts | {"flat": nn.Flatten(), "head": nn.Linear(8, 2)}).items():
        net.add_module(name, part)
    return net


def data():
    x = torch.randn(48, 1, 6, 6)
    data = TensorDataset(x, (x.mean((1, 2, 3)) > 0).long())
    return data, data


def deadly(output, target):
    if len(output) == 4 and os.environ.get("RANK") == "1" and torch.distributed.is_initialized():
        os.kill(os.getpid(), signal.SIGKILL)
    return nn.functional.cross_entropy(output, target)
"""
NAME = "[b]\u5c42$x_{$\u00e9"


def user_environ(**more: str) -> dict[str, str]:
    """For a command in a process of its own: this environment without a launcher's variables, and ``more``."""
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}
