"""The layer compared with fp64 on the whole batch, for every supported dtype, layout, split and option."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from cases import Case, check, laid_out
from fuzz import well_conditioned
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import syncnorm
from syncnorm.testing import assert_close, batch_norm_oracle, run_ranks

SPLITS = [(4, 4), (5, 2), (0, 3), (3, 0, 2), (1, 1), (0, 0, 2)]


@pytest.mark.parametrize("splits", SPLITS, ids=str)
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_even_uneven_and_empty_ranks(splits, dtype):
    check(Case(splits, dtype=dtype, steps=2))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted", "sliced"])
@pytest.mark.parametrize("dy_layout", ["contiguous", "channels_last", "permuted", "sliced", "expanded"])
@pytest.mark.parametrize("spatial", [(4, 5), (3, 2, 4)], ids=["4-D", "5-D"])
def test_layouts(layout, dy_layout, spatial):
    check(Case((3, 2), layout=layout, dy_layout=dy_layout, spatial=spatial))


@pytest.mark.parametrize("spatial", [(4, 5), (3, 2, 4)], ids=["4-D", "5-D"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dy_layout", ["contiguous", "channels_last", "permuted", "expanded"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_format_is_kept_whatever_the_layout_of_dy(spatial, layout, dy_layout, dtype):
    case = Case((3, 2), layout=layout, dy_layout=dy_layout, spatial=spatial, dtype=dtype)
    for rank, (result,) in enumerate(check(case)):
        want = laid_out(case.batch(0)[0][rank], layout).stride()
        assert result["formats"] == (want, want)


@pytest.mark.parametrize(
    "case",
    [
        Case((3, 2), spatial=()),  # (batch, C)
        Case((64, 33), spatial=()),
        Case((3, 2), spatial=(7,)),  # (batch, C, length)
        Case((3, 0), spatial=(7,)),
        Case((3, 2), channels=1),
        Case((3, 2), channels=1, layout="channels_last"),
        Case((3, 2), channels=67),  # no power of two, no multiple of a vector register
        Case((3, 2), spatial=(1, 1), layout="channels_last"),
        Case((1, 1), channels=2, spatial=(1, 2), dtype="bfloat16", layout="permuted"),  # strides (1, 1, 1, 2)
        Case((3, 2), affine=False),
        Case((3, 2), bias=False),
        Case((3, 2), track=False),
        Case((3, 2), momentum=None, steps=3),
        Case((3, 2), momentum=1.0),
        Case((3, 2), momentum=0.0),
        Case((3, 2), dtype="bfloat16", param_dtype="bfloat16"),
        Case((3, 2), dtype="float16", param_dtype="float16"),
        Case((3, 2), dtype="bfloat16", param_dtype="bfloat16", layout="channels_last", affine=False),
        Case((0, 2), dtype="bfloat16"),  # torch's layer sends bf16 from the empty rank, fp32 from the other
    ],
    ids=str,
)
def test_shapes_and_options(case):
    check(case)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    case=st.builds(
        Case,
        splits=st.lists(st.integers(0, 6), min_size=2, max_size=3).map(tuple).filter(lambda s: sum(s) >= 2),
        channels=st.integers(1, 9),
        spatial=st.lists(st.integers(1, 5), max_size=3).map(tuple),
        dtype=st.sampled_from(["float64", "float32", "bfloat16", "float16"]),
        layout=st.sampled_from(["contiguous", "channels_last", "permuted", "sliced"]),
        dy_layout=st.sampled_from(["contiguous", "channels_last", "permuted", "sliced", "expanded"]),
        affine=st.booleans(),
        track=st.booleans(),
        momentum=st.sampled_from([None, 0.1, 0.5]),
        mean=st.sampled_from([0.0, 3.0]),
        steps=st.integers(1, 2),
        seed=st.integers(0, 99),
    )
)
def test_fuzz(case):
    assume(all(well_conditioned(case, step) for step in range(case.steps)))
    check(case)


def _rank_constant_channels() -> tuple[Tensor, Tensor]:
    layer = syncnorm.SyncBatchNorm(2, momentum=1.0)
    y = layer(torch.tensor([[3.7, -1e3]]).expand(dist.get_rank() + 2, 2))
    return y.detach(), layer.running_var


def test_constant_channels():
    """The rounding error of a zero variance is negligible compared with eps, and never negative."""
    for y, var in run_ranks(_rank_constant_channels):
        assert (var >= 0).all()
        assert (var <= 1e-7).all()
        scale = 1 / 1e-5**0.5
        torch.testing.assert_close(y, torch.zeros_like(y), rtol=0, atol=1e3 * scale * 1.2e-7)


def _rank_far_from_zero(rows: tuple[int, ...], offset: float) -> tuple[Tensor, Tensor, Tensor]:
    rank = dist.get_rank()
    x = offset_batch(rows, offset).split(rows)[rank].requires_grad_()
    layer = syncnorm.SyncBatchNorm(4, momentum=1.0)
    y = layer(x)
    return y.detach(), layer.running_mean, layer.running_var


def offset_batch(rows: tuple[int, ...], offset: float) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sum(rows), 4, 16, 16, generator=generator, dtype=torch.float64) + offset
    return x.float()


@pytest.mark.parametrize("offset", [1e2, 1e3, 1e4, 1e5])
def test_mean_far_above_the_standard_deviation(offset):
    """The error is that of rounding the mean to fp32, as in local fp32 batch norm; E[x^2] would lose all digits."""
    rows = (7, 0, 4)
    x = offset_batch(rows, offset)
    want = batch_norm_oracle(list(x.split(rows)), None, None, None, torch.zeros(4), torch.ones(4), 1.0, 1e-5)
    rounding = offset * torch.finfo(torch.float32).eps
    gap = 0.05  # between the ranks' means, which are rounded before they are subtracted
    for rank, (y, mean, var) in enumerate(run_ranks(_rank_far_from_zero, 3, (rows, offset))):
        torch.testing.assert_close(mean.double(), want.running_mean, rtol=0, atol=rounding)
        torch.testing.assert_close(var.double(), want.running_var, rtol=1e-6 + rounding * (rounding + gap), atol=0)
        # rounded in the mean, in x * scale, in the shift and in their sum
        torch.testing.assert_close(y.double(), want.outputs[rank], rtol=1e-5, atol=4 * rounding)


def _rank_large_count(rows: tuple[int, ...]) -> dict[str, Tensor]:
    rank = dist.get_rank()
    x = large_batch(rows)[rank].requires_grad_()
    layer = syncnorm.SyncBatchNorm(1, momentum=1.0)
    y = layer(x)
    y.backward(large_batch(rows, seed=1)[rank])
    assert x.grad is not None
    return {"y": y.detach(), "dx": x.grad, "var": layer.running_var}


def large_batch(rows: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(sum(rows), 1, 256, 260, generator=generator).half().split(rows))


def test_counts_past_65504_in_half_precision():
    """pytorch#70901: a count in fp16 is infinite from 65,504 on."""
    rows = (2, 1)
    x, dy = large_batch(rows), large_batch(rows, seed=1)
    assert x[0].numel() > 2 * 65504
    want = batch_norm_oracle(x, dy, torch.ones(1), torch.zeros(1), torch.zeros(1), torch.ones(1), 1.0, 1e-5)
    for rank, got in enumerate(run_ranks(_rank_large_count, 2, (rows,))):
        assert_close(got["y"], want.outputs[rank], torch.float16)
        assert_close(got["dx"], want.grad_inputs[rank], torch.float16)
        assert_close(got["var"], want.running_var, torch.float32)


def _rank_all_empty() -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor], Tensor | None]:
    layer = syncnorm.SyncBatchNorm2d(3)
    layer(torch.randn(2, 3, 4, 4))
    before = {k: v.clone() for k, v in layer.named_buffers()}
    x = torch.randn(0, 3, 4, 4, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    return y, before, dict(layer.named_buffers()), layer.weight.grad


def test_all_ranks_empty_changes_nothing():
    for y, before, after, dw in run_ranks(_rank_all_empty):
        assert y.shape == (0, 3, 4, 4)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[k], after[k]) for k in before)
        assert torch.equal(dw, torch.zeros(3))


def _rank_evaluation(track: bool) -> tuple[Tensor, Tensor]:
    layer = syncnorm.SyncBatchNorm(3, track_running_stats=track).eval()
    generator = torch.Generator().manual_seed(dist.get_rank())
    x = torch.randn(4, 3, 5, generator=generator)
    if dist.get_rank() == 1:  # any communication would find rank 0 missing
        return layer(x), F.batch_norm(x, layer.running_mean, layer.running_var, training=not track)
    return x, x


@pytest.mark.parametrize("track", [True, False])
def test_evaluation_does_not_communicate(track):
    _, (got, want) = run_ranks(_rank_evaluation, args=(track,), timeout=10)
    assert torch.equal(got, want)


def _rank_in_a_world_of_one() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    ours, theirs = syncnorm.SyncBatchNorm2d(3), nn.BatchNorm2d(3)
    x = torch.randn(4, 3, 5, 5)
    return ours(x), theirs(x), ours.running_var, theirs.running_var


def test_world_of_one_and_no_group_are_plain_batch_norm():
    for y, want, var, want_var in (*run_ranks(_rank_in_a_world_of_one, 1), _rank_in_a_world_of_one()):
        assert torch.equal(y, want)
        assert torch.equal(var, want_var)


def _rank_sub_group_only(pairs: list[list[int]]) -> Tensor:
    groups = [dist.new_group(pair) for pair in pairs]
    mine = next(g for g, pair in zip(groups, pairs, strict=True) if dist.get_rank() in pair)
    layer = syncnorm.SyncBatchNorm(2, momentum=1.0, process_group=mine)
    layer(torch.full((3, 2), float(dist.get_rank())))
    return layer.running_mean


def test_group_of_some_ranks():
    means = run_ranks(_rank_sub_group_only, 3, ([[0, 2], [1]],))
    assert [m[0].item() for m in means] == [1.0, 1.0, 1.0]
    means = run_ranks(_rank_sub_group_only, 3, ([[0, 1], [2]],))
    assert [m[0].item() for m in means] == [0.5, 0.5, 2.0]


def _rank_device_mesh() -> Tensor:
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("dp",))
    layer = syncnorm.SyncBatchNorm(2, momentum=1.0, process_group=mesh)
    layer(torch.full((3, 2), float(dist.get_rank())))
    return layer.running_mean


def test_a_device_mesh_is_a_group():
    assert [m[0].item() for m in run_ranks(_rank_device_mesh)] == [0.5, 0.5]


def _rank_autocast_step(rows: tuple[int, ...]) -> dict[str, Tensor]:
    torch.manual_seed(1)
    conv, layer = nn.Conv2d(3, 4, 3), syncnorm.SyncBatchNorm2d(4, momentum=1.0)
    x = torch.randn(sum(rows), 3, 8, 8).split(rows)[dist.get_rank()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h = conv(x)
        y = layer(h)
    h.retain_grad()
    y.backward(torch.randn(sum(rows), *y.shape[1:]).bfloat16().split(rows)[dist.get_rank()])
    assert h.grad is not None
    assert conv.weight.grad.dtype == torch.float32
    return {"h": h.detach(), "y": y.detach(), "dh": h.grad, "var": layer.running_var}


def test_autocast_with_half_precision_input_and_fp32_statistics():
    rows = (3, 2)
    ranks = run_ranks(_rank_autocast_step, 2, (rows,))
    torch.manual_seed(1)
    nn.Conv2d(3, 4, 3)
    torch.randn(5, 3, 8, 8)
    dy = torch.randn(5, 4, 6, 6).bfloat16().split(rows)
    want = batch_norm_oracle(
        [r["h"] for r in ranks], dy, running_mean=torch.zeros(4), running_var=torch.ones(4), momentum=1.0
    )
    for rank, got in enumerate(ranks):
        assert got["h"].dtype == got["y"].dtype == got["dh"].dtype == torch.bfloat16
        assert_close(got["y"], want.outputs[rank], torch.bfloat16)
        assert_close(got["dh"], want.grad_inputs[rank], torch.bfloat16)
        assert_close(got["var"], want.running_var, torch.float32)
