"""The passes and the merge in C: against fp64, against the Python that they replace, and when they are used."""

import os
from collections.abc import Iterator

import pytest
import torch
from failing import errors_of
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import syncnorm
from syncnorm.layer import kernels, moments
from syncnorm.layer.kernels import cpu
from syncnorm.native import absent, library
from syncnorm.native.build import compiler
from syncnorm.testing import run_ranks

if library is None and (compiler() is None or os.environ.get("SYNCNORM_NATIVE") == "0"):
    pytest.skip(f"no native code: {absent}", allow_module_level=True)

from syncnorm.layer.kernels import native

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
LAYOUTS_3D = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last_3d}
SHAPES = [
    (64, 512),
    (3, 5),  # narrower than a vector
    (2, 1),
    (700, 3),  # several spans of rows, and a rest
    (5, 600, 3),  # two tiles of channels
    (4, 7, 7, 7),
    (2, 3, 50, 61),  # several spans of places, and a rest
    (3, 9, 1, 1),
    (2, 5, 4, 3, 6),
    (2, 64, 48, 48),  # written past the caches
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["baseline", "v3"])
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The passes of each instruction set, not only the best one."""
    if request.param == "v3" and not library.supports_v3():
        pytest.skip("this CPU lacks x86-64-v3")
    for name in ("moments", "normalize", "reduce", "finish"):
        used = getattr(native, f"_{name}")
        monkeypatch.setattr(native, f"_{name}", native._function(f"{name}_{request.param}", *used.argtypes))


def random(shape: tuple[int, ...], dtype: torch.dtype, layout: str, seed: int = 0) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    formats = {4: FORMATS, 5: LAYOUTS_3D}.get(len(shape))
    return x if formats is None else kernels.dense(x, formats[layout])


def dims(x: torch.Tensor) -> list[int]:
    return [d for d in range(x.dim()) if d != 1]


def test_there_is_native_code():
    assert library is not None, absent


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_passes_agree_with_fp64(shape, dtype, layout):
    x, dy = random(shape, dtype, layout), random(shape, dtype, layout, seed=1)
    x = x.mul_(2).add_(3)
    weight, bias = torch.rand(shape[1]) + 0.5, torch.randn(shape[1])
    assert kernels.passes_for(x, dy, weight, bias) is native
    mean, invstd = native.local_moments(x, 1e-5, torch.empty_like(x))
    y = native.normalize(x, mean, invstd, weight, bias, torch.empty_like(x))
    sums = native.reduce_grad(dy, x, mean, invstd)
    count = x.numel() // shape[1]
    dx = native.finish_grad(native.begin_grad(dy, invstd, weight), x, mean, invstd, weight, *sums, count)

    xd = x.double().requires_grad_()
    yd = nn.functional.batch_norm(xd, None, None, weight.double(), bias.double(), True)
    yd.backward(dy.double())
    var_d, mean_d = torch.var_mean(xd.detach(), dims(x), correction=0)
    torch.testing.assert_close(mean.double(), mean_d, rtol=2e-7, atol=2e-7)
    torch.testing.assert_close(invstd.double(), torch.rsqrt(var_d + 1e-5), rtol=3e-7, atol=0)
    xmu = xd.detach() - cpu.per_channel(mean_d, x)
    for got, terms in zip(sums, (dy.double(), dy.double() * xmu), strict=True):
        rounding = terms.abs().sum(dims(x)).max() * torch.finfo(torch.float32).eps / 2  # of each term, once
        torch.testing.assert_close(got.double(), terms.sum(dims(x)), rtol=1e-6, atol=rounding.item())
    place = 3e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    for got, want in ((y, yd.detach()), (dx, xd.grad)):
        assert got.dtype == dtype
        assert got.stride() == x.stride()
        torch.testing.assert_close(got.double(), want, rtol=place, atol=2e-5)


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("offset", [0.0, 2.1, 1e2, 1e4, 1e5])
def test_moments_are_accurate_to_rounding_however_far_the_mean_is_from_zero(layout, offset):
    x = random((8, 16, 40, 40), torch.float64, layout).add_(offset).float()
    var, mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    got_mean, got_invstd = native.local_moments(x, 1e-5, torch.empty_like(x))
    half_a_place = max(offset, 4.0) * torch.finfo(torch.float32).eps / 2
    torch.testing.assert_close(got_mean.double(), mean, rtol=0, atol=half_a_place)
    torch.testing.assert_close(got_invstd.double(), torch.rsqrt(var + 1e-5), rtol=3e-7, atol=0)


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("layout", FORMATS)
def test_moments_of_samples_that_are_far_from_each_other(layout):
    """The first sample is all zeros, and the others are not near it: its mean is a bad guess for theirs."""
    x = random((16, 5, 30, 30), torch.float32, layout)
    x[0] = 0
    x[1:] += 1e4
    var, mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    got_mean, got_invstd = native.local_moments(x, 1e-5, torch.empty_like(x))
    torch.testing.assert_close(got_mean.double(), mean, rtol=1e-7, atol=0)
    torch.testing.assert_close(got_invstd.double(), torch.rsqrt(var + 1e-5), rtol=3e-7, atol=0)


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("at", [0, -1], ids=["first", "last"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_nonfinite_value_spoils_its_channel_and_no_other(dtype, bad, at, layout):
    x = random((9, 12, 30, 30), dtype, layout)
    x[at, 7, at, at] = bad
    mean, invstd = native.local_moments(x, 1e-5, torch.empty_like(x))
    y = native.normalize(x, mean, invstd, None, None, torch.empty_like(x))
    spoiled = torch.zeros(12, dtype=torch.bool)
    spoiled[7] = True
    assert torch.equal(~mean.isfinite() | ~invstd.isfinite(), spoiled)
    assert torch.equal(y.isnan().all(3).all(2).all(0), spoiled)
    sums = native.reduce_grad(x, torch.ones_like(x), torch.zeros(12), torch.ones(12))
    assert torch.equal(~sums[0].isfinite(), spoiled)
    dx = native.finish_grad(x, torch.ones_like(x), torch.zeros(12), torch.ones(12), None, *sums, 5)
    assert torch.equal(~dx.isfinite().all(3).all(2).all(0), spoiled)


@pytest.mark.usefixtures("instruction_set")
def test_bf16_rounds_to_nearest_even_and_keeps_nan():
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)  # every bf16 value
    x = bits.view(torch.bfloat16).view(-1, 16).contiguous()
    slope = torch.tensor([1.0, 1.001953125, 1.005859375, 0.7]).repeat(4)  # with ties
    y = native.normalize(x, torch.zeros(16), slope, None, None, torch.empty_like(x))
    want = (x.float() * slope).to(torch.bfloat16)
    assert torch.equal(y.isnan(), want.isnan())
    assert torch.equal(y[~y.isnan()], want[~y.isnan()])


@pytest.mark.usefixtures("instruction_set")
def test_a_nan_of_all_bits_does_not_round_up_to_zero():
    x = torch.ones(2, 16, dtype=torch.bfloat16)
    bias = torch.full((16,), -1, dtype=torch.int32).view(torch.float32)
    y = native.normalize(x, torch.zeros(16), torch.ones(16), None, bias, torch.empty_like(x))
    assert y.isnan().all()


@pytest.mark.parametrize("counts", [[5], [7, 2], [0, 3], [0, 0], [4, 0, 9], [1] * 7], ids=str)
def test_the_merge_has_the_bits_of_the_one_in_python(counts):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(len(counts), 2 * 300, generator=generator)
    rows[:, 300:].abs_().add_(0.1)
    rows[0, 300:310] = 1e-5**-0.5  # a variance of zero
    got, want = native.merge(rows, counts, 1e-5, None), cpu.merge(rows, counts, 1e-5, None)
    for mine, theirs in zip(got[:3], want[:3], strict=True):
        if len(counts) <= 2:
            assert torch.equal(mine, theirs)
        torch.testing.assert_close(mine, theirs, rtol=1.2e-7, atol=1e-9)
    assert got[3] == want[3] == sum(counts)


@pytest.mark.parametrize("momentum", [0.1, 0.9, 0.0, 1.0, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("counts", [[7, 2], [0, 2], [0, 0], [1, 0]], ids=str)
def test_running_statistics_are_those_of_python(counts, dtype, momentum):
    rows = torch.rand(2, 2 * 5, generator=torch.Generator().manual_seed(0)) + 0.1
    layers = []
    for passes in (native, cpu):
        tracked = torch.tensor(3)
        running = moments.Running(torch.full((5,), 0.3, dtype=dtype), torch.ones(5, dtype=dtype), tracked, momentum)
        passes.merge(rows, counts, 1e-5, running)
        layers.append(running)
    mine, theirs = layers
    assert mine.num_batches_tracked == theirs.num_batches_tracked == (3 if sum(counts) == 0 else 4)
    torch.testing.assert_close(mine.mean, theirs.mean, rtol=2e-7, atol=0)
    torch.testing.assert_close(mine.var, theirs.var, rtol=2e-7, atol=0)


def test_running_statistics_with_gaps_are_updated():
    rows = torch.rand(2, 2 * 5) + 0.1
    whole = torch.zeros(2, 5, 3)
    running = moments.Running(whole[0, :, 0], whole[1, :, 0], None, 0.5)
    native.merge(rows, [3, 4], 1e-5, running)
    assert running.mean.all()
    assert not whole[:, :, 1:].any()


def test_autograd_knows_that_running_statistics_have_changed():
    """Their memory is written to behind torch's back; whoever has saved them for a backward must get an error."""
    rows = torch.rand(2, 2 * 5) + 0.1
    running = moments.Running(torch.zeros(5), torch.ones(5), torch.tensor(0), 0.1)
    factor = torch.ones(5, requires_grad=True)
    products = [factor * running.mean, factor * running.var]
    native.merge(rows, [3, 4], 1e-5, running)
    assert running.num_batches_tracked._version == 1
    for product in products:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.sum().backward()


def test_running_statistics_of_inference_mode_are_updated():
    with torch.inference_mode():
        running = moments.Running(torch.zeros(5), torch.ones(5), torch.tensor(0), 0.1)
    native.merge(torch.rand(2, 2 * 5) + 0.1, [3, 4], 1e-5, running)
    assert running.mean.all()


class Recorded(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operators: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operators.add(func.__name__)
        return func(*args, **kwargs or {})


class Subclass(torch.Tensor):
    pass


def test_c_gets_only_what_it_can_read(monkeypatch):
    x = torch.randn(4, 3, 2, 2)
    assert kernels.passes_for(x, nn.Parameter(torch.ones(3)), None) is native
    assert kernels.passes_for(x.bfloat16()) is native
    for dtype in (torch.float64, torch.float16):
        assert kernels.passes_for(x.to(dtype)) is cpu
    for other in (x.to("meta"), x.as_subclass(Subclass), torch._neg_view(x)):
        assert kernels.passes_for(other) is kernels.passes_for(x, other) is cpu
    with Recorded():
        assert kernels.passes_for(x) is cpu
    found = []
    torch.vmap(lambda one: (found.append(kernels.passes_for(one)), one)[1])(x)
    assert found == [cpu]
    monkeypatch.setattr(kernels, "library", None)
    assert kernels.passes_for(x) is cpu


def test_several_threads_take_the_passes_in_aten_for_large_inputs():
    large = torch.empty(2**10, 2**10)
    assert kernels.passes_for(large) is native
    torch.set_num_threads(2)
    assert kernels.passes_for(large) is cpu
    assert kernels.passes_for(large[:32]) is native


def test_a_mode_sees_the_operators_of_the_layer():
    """Such as one that counts operations, or that caches them for activation checkpointing."""
    layer, x = syncnorm.SyncBatchNorm(3), torch.randn(4, 3)
    with Recorded() as mode:
        layer(x)
    assert any("batch_norm" in name for name in mode.operators)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
def test_statistics_are_fp32_whatever_the_default_dtype_is(default):
    torch.set_default_dtype(default)
    try:
        mean, invstd = native.local_moments(torch.ones(4, 3, dtype=torch.float32), 1e-5, torch.empty(0))
        merged = native.merge(torch.cat([mean, invstd])[None], [4], 1e-5, None)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {mean.dtype, invstd.dtype, *(v.dtype for v in merged[:3])} == {torch.float32}
    assert torch.equal(mean, torch.ones(3))


def test_parameters_in_half_precision_and_with_gaps():
    x = torch.randn(6, 4)
    weight, bias = torch.rand(4, 2, dtype=torch.bfloat16)[:, 0], torch.rand(4, 2)[:, 0]
    mean, invstd = native.local_moments(x, 1e-5, torch.empty_like(x))
    y = native.normalize(x, mean, invstd, weight, bias, torch.empty_like(x))
    want = cpu.normalize(x, mean, invstd, weight, bias, torch.empty_like(x))
    torch.testing.assert_close(y, want, rtol=1e-6, atol=1e-6)


def test_an_infinite_value_makes_the_mean_infinite():
    x = torch.randn(4, 3, 50, 50)
    x[1, 1, 3, 3] = torch.inf
    mean, _ = native.local_moments(x, 1e-5, torch.empty_like(x))
    assert mean.isfinite().tolist() == [True, False, True]
    assert mean[1] == torch.inf


@pytest.mark.parametrize("momentum", [0.1, 0.7, 1.0, None])
@pytest.mark.parametrize("counts", [[5], [3, 4], [1, 0, 6, 2, 9]], ids=str)
def test_ranks_with_and_without_c_have_the_same_bits(counts, momentum):
    moments_W2C = torch.rand(len(counts), 2 * 300) * 3 + 0.1
    results = []
    for passes in (native, cpu):
        running = moments.Running(torch.linspace(-3, 3, 300), torch.linspace(0.1, 3, 300), torch.tensor(4), momentum)
        results.append([*passes.merge(moments_W2C, counts, 1e-5, running)[:3], *running[:3]])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def _rank_differentiates_odd_tensors() -> tuple[list[str], torch.Tensor, torch.Tensor]:
    layer = syncnorm.SyncBatchNorm2d(3)
    x, dy = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(2, 3, 4, 4)
    layer(x).backward(dy)  # connects: later calls are in C
    y = layer(x)
    errors = errors_of(lambda: y.backward(torch._efficientzerotensor(y.shape)))
    gradients = []
    for pack in (lambda t: t, lambda t: t.double() if t.numel() < 12 else t):
        x.grad = None
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = layer(x)
        y.backward(dy)
        gradients.append(x.grad)
    return errors, *gradients


def test_what_c_cannot_read_is_left_to_torch():
    for errors, want, got in run_ranks(_rank_differentiates_odd_tensors, timeout=30):
        assert "ZeroTensors are immutable" in errors[0]  # the operators of torch say so
        torch.testing.assert_close(got, want)
