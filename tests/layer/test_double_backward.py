"""Second derivatives compared with those of fp64 F.batch_norm on the whole batch."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from cases import DTYPES, laid_out
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import syncnorm
from syncnorm.testing import assert_close, run_ranks

C = 3


def tensors(rows: tuple[int, ...], dtype: torch.dtype) -> dict[str, list[Tensor]]:
    """x, dy and the cotangents v (of dx), u (of dw) and t (of db), by rank; u and t differ between ranks."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    whole = {name: (draw(sum(rows), C, 4, 3) + 0.5).to(dtype) for name in ("x", "dy", "v")}
    by_rank = {name: list(value.split(rows)) for name, value in whole.items()}
    return by_rank | {name: [draw(C) for _ in rows] for name in ("u", "t")}


def layer(affine: bool) -> syncnorm.SyncBatchNorm:
    made = syncnorm.SyncBatchNorm(C, affine=affine, dtype=torch.float64)
    if affine:
        nn.init.uniform_(made.weight, 0.5, 1.5, generator=torch.Generator().manual_seed(1))
    return made


def _rank_second_derivatives(
    rows: tuple[int, ...], dtype: str, affine: bool, layout: str, only_dx: bool
) -> dict[str, Tensor | None]:
    rank = dist.get_rank()
    data = {name: value[rank] for name, value in tensors(rows, DTYPES[dtype]).items()}
    bn = layer(affine)
    if dtype != "float64":
        bn = bn.float()
    x, dy = (laid_out(data[name], layout).detach().requires_grad_() for name in ("x", "dy"))
    wanted = [x] if only_dx or not affine else [x, bn.weight, bn.bias]
    first = torch.autograd.grad(bn(x), wanted, dy, create_graph=True)
    cotangents = [data["v"], *(data[name].to(g.dtype) for name, g in zip("ut", first[1:], strict=False))]
    torch.autograd.backward(first, cotangents)
    return {"x": x.grad, "dy": dy.grad, "weight": bn.weight.grad if affine else None}


def reference(rows: tuple[int, ...], dtype: str, affine: bool, only_dx: bool) -> dict[str, Tensor]:
    data = tensors(rows, DTYPES[dtype])
    x, dy, v = (torch.cat(data[name]).double().requires_grad_() for name in ("x", "dy", "v"))
    weight = layer(affine).weight if affine else torch.ones(C).double()
    weight = weight.detach().clone().requires_grad_()
    xhat = F.batch_norm(x, None, None, training=True)
    (dx,) = torch.autograd.grad(xhat * weight.view(-1, 1, 1), x, dy, create_graph=True)
    total = (dx * v).sum()
    if affine and not only_dx:
        for rank, (part_dy, part_xhat) in enumerate(zip(dy.split(rows), xhat.split(rows), strict=True)):
            total = total + (data["u"][rank] * (part_dy * part_xhat).sum((0, 2, 3))).sum()
            total = total + (data["t"][rank] * part_dy.sum((0, 2, 3))).sum()
    total.backward()
    return {"x": x.grad, "dy": dy.grad, "weight": weight.grad}


@pytest.mark.parametrize("rows", [(4, 4), (5, 2), (0, 3), (3, 0, 2)], ids=str)
@pytest.mark.parametrize("only_dx", [True, False], ids=["dx", "dx, dw, db"])
@pytest.mark.parametrize(
    ("dtype", "affine", "layout"),
    [
        ("float64", True, "contiguous"),
        ("float64", True, "channels_last"),
        ("float64", False, "permuted"),
        ("float32", True, "sliced"),
        ("bfloat16", True, "contiguous"),
    ],
)
def test_second_derivatives(rows, only_dx, dtype, affine, layout):
    want = reference(rows, dtype, affine, only_dx)
    ranks = run_ranks(_rank_second_derivatives, len(rows), (rows, dtype, affine, layout, only_dx))
    for name in ("x", "dy"):
        for got, part in zip(ranks, want[name].split(rows), strict=True):
            assert_close(got[name], part, DTYPES[dtype])
    if affine:
        assert_close(sum(got["weight"].double() for got in ranks), want["weight"], max_dtype(dtype))


def max_dtype(dtype: str) -> torch.dtype:
    """The dtype of parameter gradients: sums over the batch are at least fp32."""
    return DTYPES[dtype] if dtype in ("float64", "float32") else torch.float32


def _rank_gradient_penalty(rows: tuple[int, ...]) -> list[Tensor]:
    """A critic step as in WGAN-GP, under DDP: the loss contains the norm of the input gradient."""
    torch.manual_seed(0)
    critic = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.SiLU(), nn.Conv2d(4, 1, 1)).double()
    x = torch.randn(sum(rows), 2, 6, 6, dtype=torch.float64)
    if len(rows) > 1:
        critic = DistributedDataParallel(syncnorm.convert(critic))
        x = x.split(rows)[dist.get_rank()]
    x = x.requires_grad_()
    score = critic(x).mean((1, 2, 3))
    (dx,) = torch.autograd.grad(score.sum(), x, create_graph=True)
    # DDP averages over ranks: scaled so that this is the mean over the whole batch
    scale = len(rows) / sum(rows)
    ((dx.flatten(1).norm(dim=1) - 1).square().sum() * scale + score.sum() * scale).backward()
    return [p.grad for p in critic.parameters()]


def test_gradient_penalty_trains_like_one_process():
    want = _rank_gradient_penalty((7,))
    for grads in run_ranks(_rank_gradient_penalty, 2, ((5, 2),)):
        for got, expected in zip(grads, want, strict=True):
            assert_close(got, expected, torch.float64)


def _rank_third_derivative(x: Tensor) -> None:
    x = x.requires_grad_()
    (dx,) = torch.autograd.grad(syncnorm.SyncBatchNorm(2)(x).pow(3).sum(), x, create_graph=True)
    (ddx,) = torch.autograd.grad(dx.pow(3).sum(), x, create_graph=True)
    ddx.sum().backward()


def test_a_third_derivative_raises():
    with pytest.raises(syncnorm.SyncNormError, match="once_differentiable"):
        run_ranks(_rank_third_derivative, args=(torch.randn(3, 2),))
