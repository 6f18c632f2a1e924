"""Masked statistics compared with fp64 F.batch_norm on the valid positions only."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from cases import DTYPES, laid_out, valid
from torch import Tensor

import syncnorm
from syncnorm.errors import InputError
from syncnorm.testing import assert_close, run_ranks

C = 3
# valid positions of each sample, by rank: uneven, none on a rank, no rows on a rank
LENGTHS = [((5, 2), (4,)), ((3, 1, 5), (0, 0)), ((0,), (2, 5)), ((4, 4), ())]


def batch(lengths: tuple[tuple[int, ...], ...], dtype: str, spatial: tuple[int, ...]) -> list[dict[str, Tensor]]:
    """x, dy and the mask of each rank; padding holds NaN."""
    generator = torch.Generator().manual_seed(0)
    ranks = []
    for of_rank in lengths:
        shape = (len(of_rank), C, 5, *spatial)
        x, dy = (torch.randn(shape, generator=generator, dtype=torch.float64).to(DTYPES[dtype]) for _ in range(2))
        mask = torch.arange(5) < torch.tensor(of_rank, dtype=torch.int64).view(-1, 1)
        mask = mask.view(len(of_rank), 5, *(1,) * len(spatial))  # broadcasts over what follows
        x = (x + 2).masked_fill(~mask.unsqueeze(1), torch.nan)
        ranks.append({"x": x, "dy": dy, "mask": mask})
    return ranks


def _rank_masked_step(
    lengths: tuple[tuple[int, ...], ...], dtype: str, spatial: tuple[int, ...], layout: str
) -> dict[str, Tensor]:
    data = batch(lengths, dtype, spatial)[dist.get_rank()]
    x = laid_out(data["x"], layout).detach().requires_grad_()
    layer = syncnorm.SyncBatchNorm(C, momentum=1.0, dtype=torch.promote_types(DTYPES[dtype], torch.float32))
    y = layer(x, mask=data["mask"])
    y.backward(laid_out(data["dy"], layout))
    evaluated = layer.eval()(x.detach(), mask=data["mask"])
    assert x.grad is not None
    got = {"y": y.detach(), "dx": x.grad, "dw": layer.weight.grad, "eval": evaluated.detach()}
    return got | {k: v.clone() for k, v in layer.named_buffers()}


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize(
    ("dtype", "spatial", "layout"),
    [
        ("float64", (), "contiguous"),
        ("float32", (), "permuted"),
        ("float32", (3,), "channels_last"),
        ("bfloat16", (3,), "contiguous"),
        ("float16", (), "sliced"),
    ],
)
def test_padding_is_ignored(lengths, dtype, spatial, layout):
    data = batch(lengths, dtype, spatial)
    x = torch.cat([valid(d["x"], d["mask"]) for d in data]).double().requires_grad_()
    dy = torch.cat([valid(d["dy"], d["mask"]) for d in data]).double()
    mean, var = torch.zeros(C).double(), torch.ones(C).double()
    y = F.batch_norm(x, mean, var, training=True, momentum=1.0)
    y.backward(dy)
    counts = [len(valid(d["x"], d["mask"])) for d in data]
    evaluated = F.batch_norm(x.detach(), mean, var).split(counts)
    want = {"y": y.detach().split(counts), "dx": x.grad.split(counts), "eval": evaluated}
    sums = torch.promote_types(DTYPES[dtype], torch.float32)
    for rank, got in enumerate(run_ranks(_rank_masked_step, 2, (lengths, dtype, spatial, layout))):
        mask = data[rank]["mask"]
        for name, parts in want.items():
            assert_close(valid(got[name], mask), parts[rank], DTYPES[dtype])
            assert (got[name].masked_fill(mask.unsqueeze(1), 0) == 0).all(), f"{name} is not zero in padding"
        local = (y.detach() * dy).split(counts)[rank].sum(0)
        assert_close(got["dw"], local, sums)
        assert_close(got["running_mean"], mean, sums)
        assert_close(got["running_var"], var, sums)
        assert got["num_batches_tracked"] == 1


def _rank_nothing_valid() -> dict[str, Tensor]:
    layer = syncnorm.SyncBatchNorm(C)
    x = torch.full((2, C, 4), torch.nan, requires_grad=True)
    y = layer(x, mask=torch.zeros(2, 4, dtype=torch.bool))
    y.sum().backward()
    assert x.grad is not None
    return {"y": y.detach(), "dx": x.grad} | dict(layer.named_buffers())


def test_no_valid_position_anywhere_changes_nothing():
    for got in (*run_ranks(_rank_nothing_valid), _rank_nothing_valid()):
        assert not got["y"].any()
        assert not got["dx"].any()
        assert got["running_mean"].tolist() == [0] * C
        assert got["running_var"].tolist() == [1] * C
        assert got["num_batches_tracked"] == 0


@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("train", [True, False])
def test_without_a_process_group(track, train):
    """In training and evaluation, with and without running statistics."""
    (data,) = batch(((5, 2, 0),), "float64", ())
    layer = syncnorm.SyncBatchNorm(C, track_running_stats=track, dtype=torch.float64).train(train)
    y = layer(data["x"], mask=data["mask"])
    x = valid(data["x"], data["mask"])
    want = F.batch_norm(x, torch.zeros(C).double(), torch.ones(C).double(), training=train or not track)
    torch.testing.assert_close(valid(y, data["mask"]), want)


def test_a_single_valid_value_raises():
    layer = syncnorm.SyncBatchNorm(C)
    mask = torch.zeros(2, 4, dtype=torch.bool)
    mask[1, 2] = True
    with pytest.raises(InputError, match="expected more than 1 value per channel"):
        layer(torch.randn(2, C, 4), mask=mask)
    assert layer.num_batches_tracked == 0


def _rank_second_derivative(lengths: tuple[tuple[int, ...], ...]) -> tuple[Tensor, Tensor]:
    data = batch(lengths, "float64", ())[dist.get_rank()]
    x, dy = data["x"].requires_grad_(), data["dy"].requires_grad_()
    y = syncnorm.SyncBatchNorm(C, affine=False)(x, mask=data["mask"])
    (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
    dx.pow(3).sum().backward()
    return x.grad, dy.grad


def test_second_derivatives_of_masked_statistics():
    lengths = LENGTHS[0]
    data = batch(lengths, "float64", ())
    x, dy = (torch.cat([valid(d[k], d["mask"]) for d in data]).requires_grad_() for k in ("x", "dy"))
    (dx,) = torch.autograd.grad(F.batch_norm(x, None, None, training=True), x, dy, create_graph=True)
    dx.pow(3).sum().backward()
    counts = [len(valid(d["x"], d["mask"])) for d in data]
    for rank, (got_x, got_dy) in enumerate(run_ranks(_rank_second_derivative, 2, (lengths,))):
        mask = data[rank]["mask"]
        for got, want in ((got_x, x.grad), (got_dy, dy.grad)):
            assert_close(valid(got, mask), want.split(counts)[rank], torch.float64)
            assert (got.masked_fill(mask.unsqueeze(1), 0) == 0).all()


def test_a_mask_keeps_the_memory_format():
    x = torch.randn(4, C, 5, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
    mask = torch.rand(4, 5, 6) < 0.7
    layer = syncnorm.SyncBatchNorm(C)
    y = layer(x, mask=mask)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(x))
    for each in (y, dx, layer.eval()(x, mask=mask)):
        assert each.is_contiguous(memory_format=torch.channels_last)
