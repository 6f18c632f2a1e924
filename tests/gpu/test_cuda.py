"""The layer on a GPU: two gloo ranks share one device. Skipped without a CUDA device."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import syncnorm
from syncnorm.layer import kernels
from syncnorm.layer.kernels import cpu
from syncnorm.testing import assert_close, batch_norm_oracle, run_ranks

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

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


@pytest.mark.parametrize("layout", FORMATS)
def test_passes_agree_with_plain_aten(layout):
    cuda = kernels.for_device(torch.device("cuda"))
    assert cuda is not cpu
    (x,), (dy,) = batches((6,), torch.float32)
    x, dy = (t.cuda().contiguous(memory_format=FORMATS[layout]) for t in (x, dy))
    weight, bias = torch.rand(5, device="cuda"), torch.rand(5, device="cuda")
    count = torch.tensor(x.numel() / 5, device="cuda", dtype=torch.float64)

    mean, invstd = cuda.local_moments(x, 1e-5, torch.empty_like(x))
    sums = cuda.reduce_grad(dy, x, mean, invstd)
    for got, want in [
        ((mean, invstd), cpu.local_moments(x, 1e-5, torch.empty_like(x))),
        (
            cuda.normalize(x, mean, invstd, weight, bias, torch.empty_like(x)),
            cpu.normalize(x, mean, invstd, weight, bias, torch.empty_like(x)),
        ),
        (sums, cpu.reduce_grad(dy, x, mean, invstd)),
        (
            cuda.finish_grad(cuda.begin_grad(dy, invstd, weight), x, mean, invstd, weight, *sums, count),
            cpu.finish_grad(cpu.begin_grad(dy, invstd, weight), x, mean, invstd, weight, *sums, count),
        ),
    ]:
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def without_host_sync(rows: int, relu: bool) -> None:
    layer = syncnorm.SyncBatchNorm2d(8, device="cuda")
    x = torch.randn(rows, 8, 5, 5, device="cuda", requires_grad=True)
    dy = torch.randn(x.shape, device="cuda")
    layer(x, relu=relu).backward(dy)  # compiles the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x, relu=relu).backward(dy)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def eight_ranks() -> Iterator[None]:
    """torch's fake process group, because gloo would copy to the host."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("eight_ranks")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("rows", [4, 0])
def test_no_host_sync(rows, relu):
    without_host_sync(rows, relu)


@pytest.mark.usefixtures("eight_ranks")
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("rows", [4, 0])
def test_a_step_is_captured_in_a_graph_and_replays(rows, relu):
    layer, eager = (syncnorm.SyncBatchNorm2d(8, device="cuda") for _ in range(2))
    x, dy = (torch.randn(rows, 8, 5, 5, device="cuda") for _ in range(2))
    x.requires_grad_()

    def step(layer: nn.Module) -> tuple[Tensor, Tensor]:
        y = layer(x, relu=relu)
        (dx,) = torch.autograd.grad(y, x, dy)
        return y, dx

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # warm-up, as a capture requires
            step(layer)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(layer)
    layer.load_state_dict(eager.state_dict())
    for seed in range(3):
        torch.manual_seed(seed)
        with torch.no_grad():
            x.normal_(), dy.normal_()
        graph.replay()
        for got, want in zip(captured, step(eager), strict=True):
            torch.testing.assert_close(got, want)
    for got, want in zip(layer.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(got, want)


def test_a_converted_model_in_a_world_of_one():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).cuda()
    x = torch.randn(2, 3, 6, 6, device="cuda")
    want = F.batch_norm(model[0](x), None, None, training=True)
    torch.testing.assert_close(syncnorm.convert(model)(x), want)
