"""The layer on a GPU, what only a GPU has: streams, graphs, several devices. Skipped without a CUDA device.

Two gloo ranks share one device, or there is one process in a fake world of eight ranks (``device_steps``).
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from device_steps import VARIANTS, Step, fake_ranks, in_fp64, make_step, triton_failing

import syncnorm
from syncnorm.comm import process_groups
from syncnorm.layer import kernels
from syncnorm.layer.kernels import cpu, launch
from syncnorm.testing import assert_close, batch_norm_oracle, run_ranks
from syncnorm.tools.bench.single_process import world_of_one
from syncnorm.tools.env import environment

ROOT = Path(__file__).parents[2]
two_cards = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def batches(rows: tuple[int, ...], dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sum(rows), 5, 6, 7, generator=generator) * 2 + 3
    dy = torch.randn(x.shape, generator=generator)
    return list(x.to(dtype).split(rows)), list(dy.to(dtype).split(rows))


def _rank_step(rows: tuple[int, ...], dtype: torch.dtype, layout: str) -> dict[str, Tensor]:
    rank = dist.get_rank()
    inputs, grads = batches(rows, dtype)
    x = inputs[rank].cuda().contiguous(memory_format=FORMATS[layout]).requires_grad_()
    layer = syncnorm.SyncBatchNorm2d(5, momentum=1.0, device="cuda")
    y = layer(x)
    y.backward(grads[rank].cuda())
    assert x.grad is not None
    assert y.is_contiguous(memory_format=FORMATS[layout])
    assert x.grad.is_contiguous(memory_format=FORMATS[layout])
    got = {"y": y, "dx": x.grad, "dw": layer.weight.grad, "mean": layer.running_mean, "var": layer.running_var}
    return {k: v.detach().cpu() for k, v in got.items()}


@pytest.mark.parametrize("rows", [(4, 4), (5, 2), (0, 3), (1, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", FORMATS)
def test_two_ranks_on_one_gpu_equal_the_whole_batch(rows, dtype, layout):
    inputs, grads = batches(rows, dtype)
    want = batch_norm_oracle(inputs, grads, torch.ones(5), torch.zeros(5), torch.zeros(5), torch.ones(5), 1.0, 1e-5)
    for rank, got in enumerate(run_ranks(_rank_step, 2, (rows, dtype, layout))):
        assert_close(got["y"], want.outputs[rank], dtype)
        assert_close(got["dx"], want.grad_inputs[rank], dtype)
        assert_close(got["dw"], want.grad_weight[rank], torch.float32)
        assert_close(got["mean"], want.running_mean, torch.float32)
        assert_close(got["var"], want.running_var, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", FORMATS)
def test_passes_agree_with_those_of_the_cpu_in_fp64(layout, dtype):
    cuda = kernels.for_device(torch.device("cuda"))
    assert cuda is not cpu
    (x,), (dy,) = batches((6,), dtype)
    x, dy = (t.contiguous(memory_format=FORMATS[layout]) for t in (x, dy))
    weight, bias = torch.rand(5), torch.rand(5)

    def passes(module: Any, *tensors: Tensor) -> list[Tensor]:
        x, dy, weight, bias = tensors
        count = torch.tensor(x.numel() / 5, device=x.device, dtype=torch.float64)
        mean, invstd = module.local_moments(x, 1e-5, torch.empty_like(x))
        y = module.normalize(x, mean, invstd, weight, bias, torch.empty_like(x))
        sums = module.reduce_grad(dy, x, mean, invstd)
        dx = module.finish_grad(module.begin_grad(dy, invstd, weight), x, mean, invstd, weight, *sums, count)
        return [mean, invstd, *sums, y, dx]

    got = passes(cuda, *(t.cuda() for t in (x, dy, weight, bias)))
    want = passes(cpu, *(t.double() for t in (x, dy, weight, bias)))
    for index, (value, expected) in enumerate(zip(got, want, strict=True)):
        assert_close(value.cpu(), expected, torch.float32 if index < 4 else dtype)


@pytest.fixture
def eight_ranks() -> Iterator[None]:
    with fake_ranks():
        yield


@pytest.mark.usefixtures("eight_ranks")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("relu", [False, True])
def test_an_empty_rank_does_not_wait_for_the_gpu(relu):
    layer = syncnorm.SyncBatchNorm2d(8, device="cuda")
    x = torch.randn(0, 8, 5, 5, device="cuda", requires_grad=True)
    layer(x, relu=relu).backward(x)  # compiles the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x, relu=relu).backward(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def captured(step: Step, warm_up: Step) -> tuple[torch.cuda.CUDAGraph, dict[str, Tensor]]:
    """A graph of ``step``, and its results; ``warm_up`` runs before, on another stream, as a capture requires."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            warm_up()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph, results


def replay_and_compare(graph: torch.cuda.CUDAGraph, results: dict[str, Tensor], step: Step, eager: Step) -> None:
    """Replays the graph of ``step`` on other values, and compares each replay with a step of ``eager``."""
    for seed in range(3):
        torch.manual_seed(seed)
        with torch.no_grad():
            for leaf, like in zip(step.leaves.values(), eager.leaves.values(), strict=True):
                like.copy_(leaf.normal_())
            eager.dy.copy_(step.dy.normal_())
        graph.replay()
        for name, want in eager().items():
            torch.testing.assert_close(results[name], want, msg=lambda m, name=name: f"{name}: {m}")
        for name, want in eager.buffers.items():
            torch.testing.assert_close(step.buffers[name], want, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.usefixtures("eight_ranks")
@pytest.mark.parametrize("forward", ["gather", "sum"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
def test_each_variant_is_captured_in_a_graph_and_replays(name, channels_last, forward, monkeypatch):
    monkeypatch.setenv("SYNCNORM_FORWARD", forward)
    step, eager, warm_up = (make_step(VARIANTS[name], channels_last=channels_last) for _ in range(3))
    graph, results = captured(step, warm_up)
    replay_and_compare(graph, results, step, eager)


@pytest.mark.usefixtures("eight_ranks")
def test_an_empty_rank_is_captured():
    step, eager, warm_up = (make_step(VARIANTS["ReLU"], shape=(0, 8, 5, 5)) for _ in range(3))
    graph, results = captured(step, warm_up)
    replay_and_compare(graph, results, step, eager)


@pytest.mark.usefixtures("eight_ranks")
def test_triton_fails_during_a_capture(monkeypatch):
    step, eager, warm_up = (make_step(VARIANTS["ReLU"]) for _ in range(3))
    with monkeypatch.context() as patch:
        patch.setattr(launch, "passes_available", lambda device: False)
        warm_up()  # torch's kernels
    with triton_failing():
        with pytest.warns(UserWarning, match="Failed to find C compiler"):
            graph, results = captured(step, warm_up)
        replay_and_compare(graph, results, step, eager)


@pytest.mark.usefixtures("eight_ranks")
@pytest.mark.parametrize("shape", [(2, 70_000, 2, 2), (4, 70_000)], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_more_channels_than_a_grid_has_rows(shape, channels_last):
    if channels_last and len(shape) == 2:
        pytest.skip("2-D has one format")
    step = make_step(VARIANTS["ReLU"], channels_last=channels_last, shape=shape)
    y = step.forward()
    step = make_step(VARIANTS["ReLU"], channels_last=channels_last, shape=shape)
    want = in_fp64(step, y)
    for name, value in step().items():
        assert_close(value, want[name], torch.float32)


# A C compiler that is not there, in a process that has not compiled anything.
WITHOUT_COMPILER = """
import warnings
from device_steps import VARIANTS, fake_ranks, in_fp64, make_step
from syncnorm.layer.kernels import launch
from syncnorm.testing import assert_close
import torch

with fake_ranks(), warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    y = make_step(VARIANTS["shortcut and ReLU"]).forward()
    step = make_step(VARIANTS["shortcut and ReLU"])
    want = in_fp64(step, y)
    for name, value in step().items():
        assert_close(value, want[name], torch.float32)
(text,) = [str(each.message) for each in caught if "Triton" in str(each.message)]
assert "/nowhere/cc" in text and "C compiler" in text, text
assert not launch.passes_available(torch.device("cuda", 0))
assert "/nowhere/cc" in launch.unavailable(torch.device("cuda", 0))
"""


def test_without_a_c_compiler_torchs_kernels_are_used(tmp_path):
    env = os.environ | {"CC": "/nowhere/cc", "TRITON_CACHE_DIR": str(tmp_path)}
    env["PYTHONPATH"] = f"{ROOT}:{ROOT / 'tests' / 'support'}"
    done = subprocess.run([sys.executable, "-c", WITHOUT_COMPILER], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_env_says_that_tritons_kernels_are_used():
    assert environment().gpu_passes[0] == "Triton's kernels"


@two_cards
@pytest.mark.usefixtures("eight_ranks")
@pytest.mark.parametrize("passes", ["Triton", "torch"])
@pytest.mark.parametrize("name", ["shortcut and ReLU", "mask", "average"])
def test_an_input_on_another_device_than_the_current_one(name, passes, monkeypatch):
    if passes == "torch":
        monkeypatch.setattr(launch, "passes_available", lambda device: False)
    assert torch.cuda.current_device() == 0
    here, there = make_step(VARIANTS[name]), make_step(VARIANTS[name], device=torch.device("cuda", 1))
    want, got = here(), there()
    assert torch.cuda.current_device() == 0
    for key, value in got.items():
        assert value.device.index == 1
        torch.testing.assert_close(value.cpu(), want[key].cpu())


def _rank_on_its_own_card() -> Tensor:
    device = torch.device("cuda", dist.get_rank())  # and no set_device
    layer = syncnorm.SyncBatchNorm2d(3, device=device)
    x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(dist.get_rank())).to(device).requires_grad_()
    y = layer(x, relu=True)
    y.sum().backward()
    assert torch.cuda.current_device() == 0
    return y.detach().cpu()


@two_cards
def test_two_ranks_on_two_cards_without_set_device():
    x = torch.cat([torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(rank)) for rank in range(2)])
    want = F.batch_norm(x.double(), None, None, training=True).relu()
    assert_close(torch.cat(run_ranks(_rank_on_its_own_card, 2)), want, torch.float32)


def test_over_nccl_in_a_world_of_one():
    layer = syncnorm.SyncBatchNorm2d(3, device="cuda")
    x = torch.randn(4, 3, 5, 5, device="cuda", requires_grad=True)
    dy = torch.randn(4, 3, 5, 5, device="cuda")
    (want,) = torch.autograd.grad(F.batch_norm(x.double(), None, None, training=True), x, dy.double())
    with world_of_one("nccl", torch.device("cuda", 0)), process_groups.sync_in_world_of_one():
        for _ in range(2):
            y = layer(x)
            assert type(y.grad_fn).__name__ == "_StepBackward"
            (dx,) = torch.autograd.grad(y, x, dy)
        torch.cuda.synchronize()
    assert_close(dx, want, torch.float32)


def test_a_converted_model_in_a_world_of_one():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).cuda()
    x = torch.randn(2, 3, 6, 6, device="cuda")
    want = F.batch_norm(model[0](x), None, None, training=True)
    torch.testing.assert_close(syncnorm.convert(model)(x), want)
