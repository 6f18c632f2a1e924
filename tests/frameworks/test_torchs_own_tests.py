"""The tests that torch has for its ``SyncBatchNorm``, run with syncnorm's in its place, on CPUs over gloo.

They are part of torch's installation and need GPUs, so what they call on GPUs is replaced. Each keeps its assertions.
"""

import contextlib
import importlib
import inspect
import os
import tempfile
from importlib.util import find_spec
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from shims.torchvision_operators import make_torchvision_importable
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import syncnorm
from syncnorm.testing import run_ranks

DDP = "test_DistributedDataParallel_SyncBatchNorm"
TESTS = [
    DDP,
    f"{DDP}_2D_Input",
    f"{DDP}_Channels_Last",
    f"{DDP}_Diff_Input_Sizes_Running_Value",
    f"{DDP}_Diff_Input_Sizes_gradient",
    f"{DDP}_No_Affine",
    f"{DDP}_Single_Input_Per_Process",
    f"{DDP}_half",
    "test_SyncBatchNorm_process_group",
    "test_ddp_inference",
    "test_ddp_uneven_inputs_stop_iteration_sync_bn",
    "test_sync_bn_logged",
]


def _without_device_ids(*args, device_ids=None, output_device=None, **kwargs):
    return DistributedDataParallel(*args, **kwargs)


def _on_cpu(function):
    def call(*args, device=None, **kwargs):
        return function(*args, **kwargs)

    return call


@contextlib.contextmanager
def _cpus_as_gpus():
    def same(self, *args, **kwargs):
        return self

    with (
        mock.patch.object(torch.Tensor, "cuda", same),
        mock.patch.object(nn.Module, "cuda", same),
        mock.patch.object(torch, "randn", _on_cpu(torch.randn)),
        mock.patch.object(torch.cuda, "set_device"),
        mock.patch.object(torch.cuda, "current_device"),
        mock.patch.object(nn.parallel, "DistributedDataParallel", _without_device_ids),
    ):
        yield


def _rank_run(name: str) -> None:
    os.environ.update(BACKEND="gloo", TEMP_DIR=tempfile.gettempdir())
    make_torchvision_importable()
    torchs = importlib.import_module("torch.testing._internal.distributed.distributed_test")
    utils = importlib.import_module("torch.testing._internal.common_utils")

    class OnCpu(torchs.DistributedTest._DistTestBase, utils.TestCase):
        rank = property(lambda self: dist.get_rank())

        def _init_global_test(self):
            # This one test creates a device from the rank, the others compute with it.
            return [], None, "cpu" if name.endswith("_half") else dist.get_rank()

        def runTest(self):
            inspect.unwrap(getattr(type(self), name))(self)

        def _barrier(self, *args, **kwargs):
            dist.barrier()

    with _cpus_as_gpus(), syncnorm.replacing_torch():
        OnCpu("runTest").runTest()


@pytest.mark.parametrize("name", TESTS)
def test_it_passes(name):
    pytest.importorskip("expecttest", reason="torch's tests import it")
    if name == "test_SyncBatchNorm_process_group" and find_spec("torchvision") is None:
        pytest.skip("no torchvision")
    run_ranks(_rank_run, args=(name,))
