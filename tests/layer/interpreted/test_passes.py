"""The Triton kernels compared with fp64: compiled on a GPU, otherwise under Triton's interpreter.

``tests/layer/test_triton.py`` selects the interpreter.
"""

import itertools
import os

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1 before Triton is imported", allow_module_level=True)

import triton
import triton.language as tl

from syncnorm.layer import kernels, moments
from syncnorm.layer.kernels import cpu, cuda, parts, tiles
from syncnorm.layer.kernels.tiles import channel_tile, channel_tiles, row_tile, row_tiles
from syncnorm.layer.kernels.triton_backward import finish, pack_sums
from syncnorm.layer.kernels.triton_forward import merge, normalize, pack_moments
from syncnorm.testing import assert_close

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
EPS = 1e-5
TAG, NUMBER = 77.0, 9

# C and the number of positions: 1, not a power of two, more than a tile; several tiles in both directions; rows that
# begin between multiples of 16 bytes.
SHAPES = {
    torch.float32: [(3, 1, 5, 5), (4, 130), (2, 5, 40, 37), (2, 3, 4, 5, 6), (700, 3), (70, 2, 9)],
    torch.bfloat16: [(6, 5, 7, 3), (4, 130), (5, 8, 7, 7), (2, 6, 14, 14)],
    torch.float16: [(1, 9, 3, 1)],
}
CASES = [
    (shape, channels_last, dtype)
    for dtype, shapes in SHAPES.items()
    for shape in shapes
    for channels_last in ((False, True) if len(shape) == 4 else (False,))
]


# The interpreter computes with numpy, which warns of inf - inf.
ignores_numpy = pytest.mark.filterwarnings("ignore:invalid value encountered")


def like_x(shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool, seed: int) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    t = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).contiguous(memory_format=layout)
    return kernels.dense(t, kernels.memory_format(t)).to(DEVICE)


def tensors(shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool) -> tuple[Tensor, ...]:
    """x, dy, residual, mean, invstd, weight, bias."""
    generator = torch.Generator().manual_seed(0)
    channels = shape[1]
    mean, bias = (torch.randn(channels, generator=generator) for _ in range(2))
    invstd, weight = (torch.rand(channels, generator=generator) + 0.5 for _ in range(2))
    big = [like_x(shape, dtype, channels_last, seed) for seed in range(3)]
    return *big, *(t.to(DEVICE) for t in (mean, invstd, weight - 1, bias))


def view(vector: Tensor, like: Tensor) -> Tensor:
    """(C) -> (1, C, 1, ...), in fp64."""
    return vector.double().view(1, -1, *(1,) * (like.dim() - 2))


def sum_per_channel(t: Tensor) -> Tensor:
    return t.sum([d for d in range(t.dim()) if d != 1])


def random_mask(x: Tensor) -> Tensor:
    mask = torch.rand(x.size(0), *x.shape[2:], generator=torch.Generator().manual_seed(5)) < 0.6
    return mask.to(DEVICE)


def no_mismatch() -> Tensor:
    return torch.zeros((), dtype=torch.int64, device=DEVICE)


def count_of(n: float) -> Tensor:
    return torch.tensor(n, dtype=torch.float64, device=DEVICE)


@pytest.fixture(autouse=True)
def _semaphores_are_zero_afterwards():
    yield
    assert all(not kept.any() for (dtype, _, _), kept in parts._kept.items() if dtype == torch.int32)


# Moments of a rank


def expected_moments(x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, int]:
    """Mean, variance, count of what the mask selects, in fp64."""
    values_CN = x.double().movedim(1, 0).flatten(1)
    if mask is not None:
        values_CN = values_CN[:, mask.flatten()]
    return values_CN.mean(1), values_CN.var(1, correction=0), values_CN.size(1)


def assert_packed(packed: Tensor, mean: Tensor, var: Tensor, count: int) -> None:
    C = mean.numel()
    assert packed.dtype == torch.float32
    assert packed.shape == (2 * C + 2,)
    # In units of the standard deviation, which is about 1 in these tests, and in units in the last place.
    torch.testing.assert_close(packed[:C].double(), mean, rtol=1e-7, atol=5e-7)
    torch.testing.assert_close(packed[C : 2 * C].double(), (var + EPS).rsqrt(), rtol=5e-7, atol=0)
    assert packed[2 * C :].tolist() == [count, TAG]


@pytest.mark.parametrize(("shape", "channels_last", "dtype"), CASES, ids=str)
def test_moments_equal_fp64(shape, channels_last, dtype):
    x = like_x(shape, dtype, channels_last, 0)
    assert_packed(pack_moments(x, EPS, TAG, None), *expected_moments(x))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("shape", "channels_last", "dtype", "mean"),
    [
        ((3, 5, 40, 37), False, torch.float32, 1e4),
        ((40, 5, 7, 3), True, torch.float32, -1e4),
        ((700, 3), False, torch.float32, 1e5),
        ((5, 8, 7, 7), False, torch.bfloat16, 50),
    ],
    ids=str,
)
def test_moments_far_from_zero(shape, channels_last, dtype, mean, masked):
    x = like_x(shape, torch.float32, channels_last, 0).add_(mean).to(dtype)
    mask = random_mask(x) if masked else None
    if mask is not None:
        mask[: shape[0] // 2] = False  # whole tiles without a value, the first ones
    assert_packed(pack_moments(x, EPS, TAG, mask), *expected_moments(x, mask))


@pytest.mark.parametrize(
    ("shape", "channels_last"), [((1, 3, 20000), False), ((40, 5, 7, 7), False), ((2, 40, 60, 50), True)], ids=str
)
@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_moments_with_an_outlier(shape, channels_last, place, monkeypatch):
    monkeypatch.setattr(tiles, "_PARTS", 1)  # one program for many values
    tiles._channel_tiles.cache_clear()
    x = like_x(shape, torch.float32, channels_last, 0)
    values = x.transpose(0, 1).reshape(shape[1], -1).clone()
    values[:, {"first": 0, "middle": values.size(1) // 2, "last": -1}[place]] += 300
    # In the middle of a tile as well, where a single sample would be taken.
    values[:, min(512, values.size(1) - 1)] += 300
    x = x.clone().copy_(values.view(shape[1], shape[0], *shape[2:]).transpose(0, 1))
    packed = pack_moments(x, EPS, TAG, None)
    tiles._channel_tiles.cache_clear()
    want = (values.double().var(1, correction=0) + EPS).rsqrt()
    torch.testing.assert_close(packed[shape[1] : 2 * shape[1]].double(), want, rtol=2e-6, atol=0)


@ignores_numpy
@pytest.mark.parametrize(("shape", "channels_last", "dtype"), [CASES[0], CASES[5], CASES[8], CASES[-3]], ids=str)
def test_what_is_behind_the_mask_does_not_matter(shape, channels_last, dtype):
    x = like_x(shape, dtype, channels_last, 0)
    mask = random_mask(x)
    hidden = ~mask.unsqueeze(1).expand_as(x)
    hidden_values = torch.tensor([torch.nan, torch.inf], device=DEVICE).to(dtype)
    want = pack_moments(x, EPS, TAG, mask)
    x[hidden] = hidden_values.repeat(x.numel())[: int(hidden.sum())]
    assert torch.equal(pack_moments(x, EPS, TAG, mask), want)
    assert want[-2] == mask.sum()


@pytest.mark.parametrize("eps", [EPS, 0.0])
@pytest.mark.parametrize("shape", [(0, 5, 7, 3), (4, 5, 0), (0, 200)])
def test_an_empty_rank_sends_finite_moments(shape, eps):
    packed = pack_moments(torch.empty(shape, device=DEVICE), eps, TAG, None)
    C = shape[1]
    assert packed[:C].tolist() == [0.0] * C
    assert packed[C : 2 * C].isfinite().all()
    assert packed[2 * C :].tolist() == [0, TAG]


def test_a_rank_of_padding_alone_sends_what_an_empty_one_does():
    x = torch.full((3, 5, 4), torch.nan, device=DEVICE)
    packed = pack_moments(x, EPS, TAG, torch.zeros(3, 4, dtype=torch.bool, device=DEVICE))
    assert torch.equal(packed, pack_moments(x[:0], EPS, TAG, None))


def test_whatever_dtype_new_tensors_have_by_default():
    x = like_x((6, 5, 7, 3), torch.float32, False, 0)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        packed = pack_moments(x, EPS, TAG, None)
        mean, invstd, *_ = merge(packed[None], EPS, TAG, no_mismatch(), NUMBER, None)
        sums, _ = pack_sums(x, x, mean, invstd, None, None, None, None, False, TAG, None, None)
    finally:
        torch.set_default_dtype(before)
    assert_packed(packed, *expected_moments(x))
    assert {t.dtype for t in (mean, invstd, sums)} == {torch.float32}


@ignores_numpy
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_value_that_is_not_finite_shows_in_its_channel_alone(value):
    x = like_x((6, 5, 7, 3), torch.float32, False, 0)
    x[2, 1, 3, 0] = value
    packed = pack_moments(x, EPS, TAG, None)
    assert torch.isfinite(packed[5:10]).tolist() == [True, False, True, True, True]


# Many parts and many tiles

LARGE = [
    ((300, 6), False, torch.float32),  # many rows
    ((3, 2, 40, 37), False, torch.float32),  # many tiles of a row
    ((40, 2, 7, 7), False, torch.bfloat16),  # rows that begin within a load
]


@pytest.fixture
def _small_tiles(monkeypatch):
    """So that a small tensor has many tiles, a channel several parts, and the last program several chunks of them."""
    from syncnorm.layer.kernels import tiles

    for name, value in {
        "_SUMS": {kind: tuned._replace(tile_bytes=512) for kind, tuned in tiles._SUMS.items()},
        "_ROW_TILE_BYTES": 2048,
        "_PARTS": 9,
        "_CHUNK_VALUES": 8,
    }.items():
        monkeypatch.setattr(tiles, name, value)
    caches = tiles._row_tiles, tiles._channel_tiles
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("shape", "channels_last", "dtype"), LARGE, ids=str)
def test_several_parts_of_a_channel(shape, channels_last, dtype, masked):
    x, dy, _, _, _, weight, bias = tensors(shape, dtype, channels_last)
    x = (x + 30).to(dtype)
    mask = random_mask(x) if masked else None
    n = channel_tiles(x, "sums")
    assert n.parts > n.chunk
    assert row_tiles(x).programs > 2
    packed = pack_moments(x, EPS, TAG, mask)
    assert_packed(packed, *expected_moments(x, mask))
    mean, invstd = packed[: 2 * n.C].chunk(2)
    check_step(x, dy, None, mean, invstd, weight, bias, mask, relu=True)


# Normalization and gradients


def check_step(x, dy, residual, mean, invstd, weight, bias, mask, relu):
    """Runs normalize, pack_sums and finish, and compares all they write with fp64."""
    y = torch.full_like(x, torch.nan)
    normalize(x, mean, invstd, weight, bias, residual, mask, relu, y)

    one, zero = torch.ones_like(mean), torch.zeros_like(mean)
    scale = invstd * (one if weight is None else weight)
    xmu = x.double() - view(mean, x)
    z = xmu * view(scale, x) + view(zero if bias is None else bias, x)
    z = z if residual is None else z + residual.double()
    z = z.relu() if relu else z
    counts = torch.ones_like(x) if mask is None else mask.unsqueeze(1).expand_as(x)
    assert_close(y, torch.where(counts != 0, z, 0), x.dtype)
    assert y.stride() == x.stride()

    # Within rounding of zero either sign is right.
    passed = dy.double() * counts * ((y > 0) if relu else 1)
    kept = y if relu and residual is not None else None
    d_weight, d_bias = (None if v is None else torch.full_like(v, torch.nan) for v in (weight, bias))
    packed, dz = pack_sums(dy, x, mean, invstd, weight, bias, kept, mask, relu, TAG, d_weight, d_bias)
    C = mean.numel()
    assert packed.shape == (2 * C + 1,)
    want_sums = sum_per_channel(passed), sum_per_channel(passed * xmu)
    for got, want in zip(packed[:-1].chunk(2), want_sums, strict=True):
        assert_close(got, want, torch.float32)
    assert packed[-1] == TAG
    if d_weight is not None:
        assert_close(d_weight, want_sums[1] * invstd.double(), d_weight.dtype)
    if d_bias is not None:
        assert_close(d_bias, want_sums[0], d_bias.dtype)
    if kept is None:
        assert dz is None
    else:
        assert dz is not None
        assert torch.equal(dz.double(), passed)

    dx, mismatch = torch.full_like(x, torch.nan), no_mismatch()
    count = count_of(77.0)
    begun, rectify = (dy, relu) if dz is None else (dz, False)
    finish(begun, x, mean, invstd, weight, bias, mask, packed, count, rectify, TAG, mismatch, NUMBER, dx)
    mean_dy, mean_dy_xmu = (view(v, x) / 77 for v in packed[:-1].chunk(2))
    want_dx = view(scale, x) * (passed - mean_dy - xmu * view(invstd, x).square() * mean_dy_xmu) * counts
    assert_close(dx, want_dx, x.dtype)
    assert mismatch == 0


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize(("shape", "channels_last", "dtype"), CASES, ids=str)
def test_passes_equal_fp64(shape, channels_last, dtype, with_residual):
    x, dy, residual, *vectors = tensors(shape, dtype, channels_last)
    check_step(x, dy, residual if with_residual else None, *vectors, None, relu=True)


@ignores_numpy
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(
    ("shape", "channels_last"), [((6, 5, 7, 3), False), ((6, 8, 7, 3), True), ((9, 6), False)], ids=str
)
def test_with_a_mask(shape, channels_last, relu, with_residual, dtype):
    x, dy, residual, *vectors = tensors(shape, dtype, channels_last)
    mask = random_mask(x)
    residual = residual if with_residual else None
    check_step(x, dy, residual, *vectors, mask, relu)

    # What is behind the mask is not read, or does not matter.
    got = []
    for fill in (None, torch.nan, torch.inf):
        if fill is not None:
            for t in (x, dy):
                t.masked_fill_(~mask.unsqueeze(1), fill)
        packed, _ = pack_sums(dy, x, *vectors, None, mask, relu, TAG, None, None)
        dx = torch.empty_like(x)
        finish(dy, x, *vectors, mask, packed, count_of(9), relu, TAG, no_mismatch(), NUMBER, dx)
        got.append((packed, dx))
    for packed, dx in got[1:]:
        assert torch.equal(packed, got[0][0])
        assert torch.equal(dx, got[0][1])


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("parameters", [(True, True), (True, False), (False, True), (False, False)], ids=str)
def test_without_weight_and_bias(parameters, with_residual, relu):
    x, dy, residual, mean, invstd, *affine = tensors((6, 5, 7, 3), torch.float32, False)
    weight, bias = (v if there else None for v, there in zip(affine, parameters, strict=True))
    check_step(x, dy, residual if with_residual else None, mean, invstd, weight, bias, None, relu)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_in_half_precision(dtype):
    x, dy, residual, mean, invstd, weight, bias = tensors((6, 5, 7, 3), dtype, False)
    check_step(x, dy, residual, mean, invstd, weight.to(dtype), bias.to(dtype), None, relu=True)


def test_a_nan_propagates_through_the_relu_as_in_torch():
    x, dy, _, mean, invstd, weight, bias = tensors((6, 5, 7, 3), torch.float32, False)
    x[0, 1, 2, 0] = torch.nan
    y = torch.empty_like(x)
    normalize(x, mean, invstd, weight, bias, None, None, True, y)
    assert torch.isnan(y).sum() == 1
    assert torch.isnan(F.relu(x)).equal(torch.isnan(y))
    packed, _ = pack_sums(dy, x, mean, invstd, weight, bias, None, None, True, TAG, None, None)
    assert torch.isnan(packed[5:10]).tolist() == [False, True, False, False, False]


def test_forward_and_backward_agree_on_the_sign():
    """Of values that are zero up to rounding: the backward must pass exactly those that the forward did."""
    x, _, _, mean, invstd, weight, _ = tensors((6, 5, 40, 3), torch.float32, False)
    bias = -((x[0, :, 0, 0] - mean) * (invstd * weight))
    x = x[:1, :, :1, :1].expand_as(x).contiguous()
    y, dx = torch.empty_like(x), torch.empty_like(x)
    normalize(x, mean, invstd, weight, bias, None, None, True, y)
    ones, no_sums = torch.ones_like(x), torch.zeros(11, device=DEVICE)
    packed, _ = pack_sums(ones, x, mean, invstd, weight, bias, None, None, True, TAG, None, None)
    assert torch.equal(packed[:5], sum_per_channel((y > 0).float()))
    no_sums[-1] = TAG
    finish(ones, x, mean, invstd, weight, bias, None, no_sums, count_of(1), True, TAG, no_mismatch(), NUMBER, dx)
    assert torch.equal(dx != 0, y > 0)


def test_the_passes_of_an_empty_rank():
    _, _, _, mean, invstd, weight, bias = tensors((6, 5, 7, 3), torch.float32, False)
    x = torch.empty(0, 5, 7, 3, device=DEVICE)
    normalize(x, mean, invstd, weight, bias, x, None, True, x)
    d_weight, d_bias = (torch.full((5,), torch.nan, device=DEVICE) for _ in range(2))
    packed, dz = pack_sums(x, x, mean, invstd, weight, bias, x, None, True, TAG, d_weight, d_bias)
    assert packed.tolist() == [0.0] * 10 + [TAG]
    assert dz is not None
    assert dz.shape == x.shape
    assert not d_weight.any()
    assert not d_bias.any()
    mismatch = no_mismatch()
    finish(x, x, mean, invstd, weight, bias, None, packed, count_of(3), True, TAG, mismatch, NUMBER, x)
    assert mismatch == 0
    finish(x, x, mean, invstd, weight, bias, None, packed, count_of(3), True, TAG + 1, mismatch, NUMBER, x)
    assert mismatch == NUMBER


# Merge


def rows_of(counts: tuple[int, ...], channels: int) -> Tensor:
    generator = torch.Generator().manual_seed(len(counts))
    rows = torch.randn(len(counts), 2 * channels + 2, generator=generator)
    rows[:, channels:-2] = rows[:, channels:-2].abs() + 0.1
    rows[:, -2] = torch.tensor(counts)
    rows[:, -1] = TAG
    rows[rows[:, -2] == 0, :channels] = 0
    return rows.to(DEVICE)


def running_statistics(channels: int, dtype: torch.dtype | None, momentum: float | None) -> moments.Running | None:
    if dtype is None:
        return None
    buffers = torch.rand(2, channels, generator=torch.Generator().manual_seed(3))
    return moments.Running(*buffers.to(DEVICE, dtype), torch.tensor(7, device=DEVICE), momentum)


@pytest.mark.parametrize(
    ("counts", "channels", "momentum", "running_dtype"),
    [
        ((4, 4, 4), 5, 0.1, torch.float32),
        ((9, 0, 2), 200, 0.7, torch.bfloat16),
        ((0, 5), 1, 1.0, torch.float32),
        ((0, 0), 5, 0.1, torch.float32),
        ((3,), 5, 0.1, None),
        ((70000, 1), 200, 0.1, torch.float32),
        ((4, 0, 7), 5, None, torch.float32),
        ((4, 7), 700, None, torch.float16),  # several programs, of which one counts up
        ((0, 0), 5, None, torch.float32),
        ((2, 0, 3, 1) * 50, 33, 0.3, torch.float32),  # more ranks than a tile has
    ],
    ids=str,
)
def test_merging_equals_plain_operators(counts, channels, momentum, running_dtype):
    rows = rows_of(counts, channels)
    before = rows.clone()
    ours, theirs = (running_statistics(channels, running_dtype, momentum) for _ in range(2))
    mismatch = no_mismatch()
    got = merge(rows, EPS, TAG, mismatch, NUMBER, ours)
    want = cpu.merge(rows[:, :-2], rows[:, -2:-1], EPS, theirs)
    for name, a, b in zip(("mean", "invstd", "var", "count"), got, want, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=3e-7, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}")
    if ours is not None and theirs is not None:
        for a, b in zip(ours[:3], theirs[:3], strict=True):
            torch.testing.assert_close(a, b, rtol=torch.finfo(running_dtype).eps * 2, atol=1e-7)
    assert torch.equal(rows, before)
    assert mismatch == 0


def test_an_empty_batch_changes_no_running_statistic_whatever_its_moments_are():
    rows = rows_of((0, 0), 5)
    rows[:, :5] = torch.nan
    for momentum in (0.1, None):
        running = running_statistics(5, torch.float32, momentum)
        assert running is not None
        merge(rows, EPS, TAG, no_mismatch(), NUMBER, running)
        for a, b in zip(running, running_statistics(5, torch.float32, momentum), strict=True):
            assert a == b if momentum is b else torch.equal(a, b)


def test_without_a_number_of_batches():
    running = running_statistics(5, torch.float32, 0.5)._replace(num_batches_tracked=None)
    before = running.mean.clone()
    mean, *_ = merge(rows_of((3, 4), 5), EPS, TAG, no_mismatch(), NUMBER, running)
    torch.testing.assert_close(running.mean, (before + mean) / 2)


@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
@pytest.mark.parametrize("others_tag", [TAG + 1, torch.nan])
@pytest.mark.parametrize("rank", [0, 1, 149])
def test_another_tag_in_the_forward(rank, others_tag, momentum):
    rows = rows_of((3, 2, 4) * 50, 40)
    rows[rank, -1] = others_tag
    running, untouched = (running_statistics(40, torch.float32, momentum) for _ in range(2))
    mismatch = no_mismatch()
    results = merge(rows, EPS, TAG, mismatch, NUMBER, running)
    assert all(result.isnan().all() for result in results)
    assert mismatch == NUMBER
    for a, b in zip(running[:3], untouched[:3], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("masked", [False, True])
def test_another_tag_in_the_backward(masked):
    x, dy, _, *vectors = tensors((6, 5, 7, 3), torch.float32, False)
    mask = random_mask(x) if masked else None
    packed, _ = pack_sums(dy, x, *vectors, None, mask, True, TAG, None, None)
    dx, mismatch = torch.zeros_like(x), no_mismatch()
    finish(dy, x, *vectors, mask, packed, count_of(9), True, 2 * TAG, mismatch, NUMBER, dx)
    assert torch.equal(dx.isnan(), torch.ones_like(x) != 0 if mask is None else mask.unsqueeze(1).expand_as(x))
    assert mismatch == NUMBER


def test_uneven_ranks_are_merged_to_the_whole_batch():
    whole = like_x((12, 5, 7, 3), torch.float32, False, 0) + 1e4
    whole[:3] += 5  # the ranks differ
    ranks = whole.split([3, 0, 8, 1])
    rows = torch.stack([pack_moments(x.contiguous(), EPS, TAG, None) for x in ranks])
    mean, invstd, var, count = merge(rows, EPS, TAG, no_mismatch(), NUMBER, None)
    want_mean, want_var, want_count = expected_moments(whole)
    torch.testing.assert_close(mean.double(), want_mean, rtol=1e-7, atol=0)
    # Means travel in fp32, of which one unit is 1e-3 here.
    torch.testing.assert_close(var.double(), want_var, rtol=1e-3, atol=0)
    torch.testing.assert_close(invstd, (var + EPS).rsqrt())
    assert count == want_count


# Offsets beyond 32 bits, of tensors that no test can allocate


@triton.jit
def _offsets_of_rows(out, tile, A, R, B, tile_A: tl.constexpr, tile_R: tl.constexpr):
    at, inside, channel, _, place = row_tile(tile, A, R, B, 8, 8, tile_A, tile_R)
    tl.store(out, tl.max(tl.where(inside, at, 0)))
    tl.store(out + 1, tl.max(channel))
    tl.store(out + 2, tl.max(tl.where(inside, place, 0)))


@triton.jit
def _offsets_of_channels(
    out, tile, c, A, C, B, tiles_B, shifted: tl.constexpr, tile_A: tl.constexpr, tile_B: tl.constexpr
):
    at, _, inside, place = channel_tile(tile, c, A, C, B, tiles_B, 1, shifted, tile_A, 1, tile_B)
    tl.store(out, tl.max(tl.where(inside, at, 0)))
    tl.store(out + 1, tl.max(tl.where(inside, place, 0)))


@pytest.mark.parametrize(
    ("A", "C", "B"),
    [(2**20, 64, 112 * 112), (2**26, 64, 1), (2**33, 64, 1), (2, 64, 2**27), (1, 8, 2**31 + 16)],
    ids=str,
)
def test_offsets_of_64_bits(A, C, B):
    out = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    R, tile_A, tile_R = C * B, 16, 64  # the index of the last tile has 32 bits, as in a kernel
    last = -(-A // tile_A) * -(-R // tile_R) - 1
    _offsets_of_rows[(1,)](out, last, A, R, B, tile_A, tile_R)
    assert out.tolist() == [A * R - 1, C - 1, A * B - 1] if B > 1 else [A * R - 1, C - 1, A - 1]
    if B > 1:
        for shifted in (False, tile_A * C * B < 2**31):  # the offsets of shifted rows in a tile have 32 bits
            tiles_B = -(-B // 64)
            last = -(-A // tile_A) * tiles_B - 1
            _offsets_of_channels[(1,)](out, last, C - 1, A, C, B, tiles_B, shifted, tile_A, 64)
            assert out[:2].tolist() == [A * R - 1, A * B - 1]


@pytest.mark.parametrize(("C", "B", "shifted"), [(4, 2**28 + 1, True), (4, 2**30 + 1, False), (2**20, 49, False)])
def test_rows_are_shifted_where_offsets_in_a_tile_have_32_bits(C, B, shifted):
    assert channel_tiles(torch.empty(8, C, B, dtype=torch.bfloat16, device="meta"), "sums").shifted == shifted


@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("counts", [(4, 0, 3), (0, 0)], ids=str)
def test_the_merge_of_the_generic_passes(counts, momentum):
    """On rows as the generic gather returns them, also NaN after a wrong tag; what the kernel cannot write to."""
    generator = torch.Generator().manual_seed(0)
    clean = torch.cat([torch.rand(len(counts), 6, generator=generator) + 0.1, torch.tensor(counts).view(-1, 1)], 1)
    for dtype, factor in itertools.product((torch.float32, torch.bfloat16, torch.float64), (1.0, torch.nan)):
        rows, results = (clean * factor).to(DEVICE), []
        for passes in (cuda, cpu):
            buffers = torch.full((2, 3), 0.5, dtype=dtype, device=DEVICE)
            running = moments.Running(*buffers.unbind(), torch.tensor(4, device=DEVICE), momentum)
            assert cuda.can_track(running) == (dtype != torch.float64)
            results.append([*passes.merge(rows[:, :-1], rows[:, -1:], 1e-5, running), *running[:3]])
        for got, want in zip(*results, strict=True):
            rtol = max(3e-7, torch.finfo(dtype).eps * 2)
            torch.testing.assert_close(got, want, rtol=rtol, atol=1e-7, equal_nan=True)
