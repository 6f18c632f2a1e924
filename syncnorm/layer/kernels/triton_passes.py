"""The passes of ``relu(batch_norm(x) + residual)`` and of its gradient: one Triton kernel for each pass over x.

A dense x is (A, C, B) in memory: (samples, channels, positions) if it is contiguous, (samples * positions, channels,
1) if the channel is the fastest axis. Kernels process tiles of that shape and compute in fp32, so half precision is
rounded once.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from syncnorm.layer.moments import Count

_TILE_VALUES = 4096
_REDUCE_PROGRAMS = 1024  # several for each multiprocessor of any GPU


class _Layout(NamedTuple):
    A: int
    C: int
    B: int
    tile_A: int
    tile_C: int
    tile_B: int

    @property
    def tiles_A(self) -> int:
        return -(-self.A // self.tile_A)

    @property
    def tiles_B(self) -> int:
        return -(-self.B // self.tile_B)

    @property
    def tiles_C(self) -> int:
        return -(-self.C // self.tile_C)


def _layout(x: Tensor, tile: int = _TILE_VALUES) -> _Layout:
    C = x.size(1)
    if x.stride(1) == 1 or x.dim() == 2:
        tile_C = min(triton.next_power_of_2(C), 128)
        A = x.numel() // C
        return _Layout(A, C, 1, min(triton.next_power_of_2(A), tile // tile_C), tile_C, 1)
    B = x.numel() // (x.size(0) * C)
    tile_B = min(triton.next_power_of_2(B), 1024)
    return _Layout(x.size(0), C, B, min(triton.next_power_of_2(x.size(0)), tile // tile_B), 1, tile_B)


@triton.jit
def _tile(a, c, b, A, C, B, tile_A: tl.constexpr, tile_C: tl.constexpr, tile_B: tl.constexpr):
    """Offsets of the tile that begins at (a, c, b), which of them are inside x, and its channels."""
    at_a = a + tl.arange(0, tile_A).to(tl.int64)[:, None, None]
    at_c = c + tl.arange(0, tile_C)[None, :, None]
    at_b = b + tl.arange(0, tile_B)[None, None, :]
    return (at_a * C + at_c) * B + at_b, (at_a < A) & (at_c < C) & (at_b < B), at_c


@triton.jit
def _vector(pointer, channels, C, absent: tl.constexpr):
    """One value per channel; ``absent`` if there is no such parameter."""
    if pointer is None:
        return tl.full(channels.shape, absent, tl.float32)
    return tl.load(pointer + channels, mask=channels < C, other=absent).to(tl.float32)


@triton.jit
def _normalized(x, mean, invstd, weight, bias):
    # Shared by forward and backward, which must compute the same signs.
    return (x - mean) * (invstd * weight) + bias


@triton.jit
def _normalize_kernel(
    x, mean, invstd, weight, bias, residual, y, A, C, B,
    tile_A: tl.constexpr, tile_C: tl.constexpr, tile_B: tl.constexpr,
):  # fmt: skip
    tiles_B = tl.cdiv(B, tile_B)
    tile, c = tl.program_id(0), tl.program_id(1) * tile_C
    a, b = (tile // tiles_B).to(tl.int64) * tile_A, (tile % tiles_B) * tile_B
    at, inside, channels = _tile(a, c, b, A, C, B, tile_A, tile_C, tile_B)
    z = _normalized(
        tl.load(x + at, mask=inside, other=0.0).to(tl.float32),
        _vector(mean, channels, C, 0.0),
        _vector(invstd, channels, C, 0.0),
        _vector(weight, channels, C, 1.0),
        _vector(bias, channels, C, 0.0),
    )
    if residual is not None:
        z += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    z = tl.where(z < 0, 0.0, z)  # keeps NaN, as torch.relu does
    tl.store(y + at, z.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _reduce_kernel(
    dy, x, mean, invstd, weight, bias, y, dz, partial, A, C, B, tiles_per_program,
    tile_A: tl.constexpr, tile_C: tl.constexpr, tile_B: tl.constexpr,
):  # fmt: skip
    c, part = tl.program_id(0) * tile_C, tl.program_id(1)
    channels = c + tl.arange(0, tile_C)[None, :, None]
    mean_c = _vector(mean, channels, C, 0.0)
    invstd_c = _vector(invstd, channels, C, 0.0)
    weight_c = _vector(weight, channels, C, 1.0)
    bias_c = _vector(bias, channels, C, 0.0)
    sum_dy = tl.zeros((tile_A, tile_C, tile_B), tl.float32)
    sum_dy_xmu = tl.zeros((tile_A, tile_C, tile_B), tl.float32)
    tiles_B = tl.cdiv(B, tile_B)
    for i in range(tiles_per_program):
        tile = part * tiles_per_program + i
        a, b = (tile // tiles_B).to(tl.int64) * tile_A, (tile % tiles_B) * tile_B
        at, inside, _ = _tile(a, c, b, A, C, B, tile_A, tile_C, tile_B)
        x_ = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        dy_ = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        if y is None:
            z = _normalized(x_, mean_c, invstd_c, weight_c, bias_c)
        else:
            z = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
        dz_ = tl.where((z <= 0) | (inside == 0), 0.0, dy_)
        if y is not None:
            tl.store(dz + at, dz_.to(dz.dtype.element_ty), mask=inside)
        sum_dy += dz_
        sum_dy_xmu += dz_ * (x_ - mean_c)
    at_c = c + tl.arange(0, tile_C)
    out = partial + part.to(tl.int64) * 2 * C + at_c
    tl.store(out, tl.sum(tl.sum(sum_dy, 2), 0), mask=at_c < C)
    tl.store(out + C, tl.sum(tl.sum(sum_dy_xmu, 2), 0), mask=at_c < C)


@triton.jit
def _finish_kernel(
    dy, x, mean, invstd, weight, bias, mean_dy, mean_dy_xmu, dx, A, C, B, rectify: tl.constexpr,
    tile_A: tl.constexpr, tile_C: tl.constexpr, tile_B: tl.constexpr,
):  # fmt: skip
    tiles_B = tl.cdiv(B, tile_B)
    tile, c = tl.program_id(0), tl.program_id(1) * tile_C
    a, b = (tile // tiles_B).to(tl.int64) * tile_A, (tile % tiles_B) * tile_B
    at, inside, channels = _tile(a, c, b, A, C, B, tile_A, tile_C, tile_B)
    x_ = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    dz = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
    mean_c = _vector(mean, channels, C, 0.0)
    invstd_c = _vector(invstd, channels, C, 0.0)
    weight_c = _vector(weight, channels, C, 1.0)
    if rectify:
        dz = tl.where(_normalized(x_, mean_c, invstd_c, weight_c, _vector(bias, channels, C, 0.0)) <= 0, 0.0, dz)
    slope = invstd_c * invstd_c * _vector(mean_dy_xmu, channels, C, 0.0)
    dx_ = (dz - _vector(mean_dy, channels, C, 0.0) - (x_ - mean_c) * slope) * (weight_c * invstd_c)
    tl.store(dx + at, dx_.to(dx.dtype.element_ty), mask=inside)


def normalize(
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor,
) -> None:
    """``y = relu((x - mean) * invstd * weight + bias + residual)`` in one pass.

    Args:
        x: dense (``kernels.dense``) and not empty, up to fp32.
        mean: (C), fp32.
        invstd: (C), fp32.
        weight: (C) or None.
        bias: (C) or None.
        residual: like x, or None.
        y: like x; written.
    """
    n = _layout(x)
    _launch(
        _normalize_kernel, (n.tiles_A * n.tiles_B, n.tiles_C), x, mean, invstd, weight, bias, residual, y, layout=n
    )


def reduce_grad(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``sum(dz)`` and ``sum(dz * (x - mean))``, each (C) fp32, and ``dz``: dy where the ReLU passed values, else 0.

    Args:
        dy: like x.
        x: as in :func:`normalize`, and so are mean, invstd, weight and bias.
        y: the output of the forward if a residual was added; dz is then its gradient. Without a residual dz is None,
            and the mask of the ReLU is computed from x here and in :func:`finish_grad`.
    """
    n = _layout(x, _TILE_VALUES // 4)  # the accumulators are tiles
    tiles = n.tiles_A * n.tiles_B
    per_program = triton.cdiv(tiles, max(1, min(tiles, _REDUCE_PROGRAMS // n.tiles_C)))
    parts = triton.cdiv(tiles, per_program)
    partial = mean.new_empty(parts, 2, n.C)
    dz = None if y is None else torch.empty_like(x)
    _launch(
        _reduce_kernel,
        (n.tiles_C, parts),
        dy,
        x,
        mean,
        invstd,
        weight,
        bias,
        y,
        dz,
        partial,
        after=(per_program,),
        layout=n,
    )
    sum_dy, sum_dy_xmu = partial.sum(0)
    return sum_dy, sum_dy_xmu, dz


def finish_grad(
    dz: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    sum_dy: Tensor,
    sum_dy_xmu: Tensor,
    count: Count,
    rectify: bool,
    dx: Tensor,
) -> None:
    """``dx = weight * invstd * (dz - sum_dy / N - (x - mean) * invstd^2 * sum_dy_xmu / N)`` in one pass.

    Args:
        dz: like x.
        x: as in :func:`normalize`, and so are mean, invstd, weight and bias.
        sum_dy: (C), fp32, of all ranks.
        sum_dy_xmu: (C), fp32, of all ranks.
        count: N, of all ranks.
        rectify: ``dz`` is the gradient of the output, without a residual: apply the mask of the ReLU.
        dx: like x; written.
    """
    n = _layout(x)
    mean_dy, mean_dy_xmu = sum_dy / count, sum_dy_xmu / count
    _launch(
        _finish_kernel, (n.tiles_A * n.tiles_B, n.tiles_C),
        dz, x, mean, invstd, weight, bias, mean_dy, mean_dy_xmu, dx, after=(rectify,), layout=n,
    )  # fmt: skip


def _launch(
    kernel: Any, grid: tuple[int, int], *tensors: Tensor | None, after: tuple[int, ...] = (), layout: _Layout
) -> None:
    A, C, B, *tile = layout
    kernel[grid](*tensors, A, C, B, *after, *tile)
