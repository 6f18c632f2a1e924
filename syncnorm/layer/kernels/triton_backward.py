"""The backward of a synced batch norm in two kernels: sums of this rank, then dx from the sums of all ranks.

Where the ReLU was open is computed again from x, or read from y if a shortcut was added: y is in memory anyway, as
the input of the next layer. The gradient of the shortcut is written by the first kernel and read by the second.

Shapes: C = channels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from syncnorm.layer.kernels.launch import launch
from syncnorm.layer.kernels.parts import is_last, partial_sums, semaphores
from syncnorm.layer.kernels.tiles import (
    SIZES,
    affine,
    channel_tile,
    channel_tiles,
    per_channel,
    row_tile,
    row_tiles,
    sum_over_tile,
)


def pack_sums(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None,
    mask: Tensor | None,
    relu: bool,
    tag: float,
    d_weight: Tensor | None,
    d_bias: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """The row that a rank sends in the backward, ``[sum(dz) (C) | sum(dz * (x - mean)) (C) | tag]``, in one launch.

    ``dz`` is dy where the mask is True and the ReLU was open, else 0.

    Args:
        dy: like x.
        x: as in ``triton_forward.normalize``, and so are mean, invstd, weight, bias, mask and relu; it may be empty.
        y: the output, if a shortcut was added before a ReLU, else None.
        tag: as in ``triton_forward.pack_moments``.
        d_weight: like weight; filled with the gradient of this rank. None: not needed.
        d_bias: like bias; filled with the gradient of this rank. None: not needed.

    Returns:
        The row, (2C + 1), fp32; and ``dz``, the gradient of the shortcut, if ``y`` is given, else None.
    """
    n = channel_tiles(x, "sums", small=mask is not None or y is not None)
    packed = torch.empty(2 * n.C + 1, dtype=torch.float32, device=x.device)
    partial = partial_sums(n.parts * 2 * n.C, x.device)
    dz = None if y is None else torch.empty_like(x)
    launch(
        _sums_kernel, (n.tiles_C * n.parts, 1),
        dy, x, mean, invstd, weight, bias, y, mask, dz, packed, d_weight, d_bias, partial,
        semaphores(n.tiles_C, x.device), tag, relu, *n,
    )  # fmt: skip
    return packed, dz


@triton.jit(do_not_specialize=SIZES)
def _sums_kernel(
    dy, x, mean, invstd, weight, bias, y, mask, dz, packed, d_weight, d_bias, partial, arrived, tag,
    relu: tl.constexpr, A, C, B, tiles_B, parts,
    vector: tl.constexpr, shifted: tl.constexpr,
    tile_A: tl.constexpr, tile_C: tl.constexpr, tile_B: tl.constexpr, chunk: tl.constexpr,
):  # fmt: skip
    tiles_C = tl.cdiv(C, tile_C)
    group, part = tl.program_id(0) % tiles_C, tl.program_id(0) // tiles_C
    channel = group * tile_C + tl.arange(0, tile_C)[None, :, None]
    exists = channel < C
    mean_c = per_channel(mean, channel, exists, 0.0)
    invstd_c = per_channel(invstd, channel, exists, 0.0)
    weight_c = per_channel(weight, channel, exists, 1.0)
    bias_c = per_channel(bias, channel, exists, 0.0)
    sum_dz = tl.zeros((tile_A, tile_C, tile_B), tl.float32)
    sum_dz_xmu = tl.zeros((tile_A, tile_C, tile_B), tl.float32)
    # Every parts-th tile: all programs together go through x from its beginning to its end.
    for tile in range(part, tl.cdiv(A, tile_A) * tiles_B, parts):
        at, loaded, inside, place = channel_tile(
            tile, group * tile_C, A, C, B, tiles_B, vector, shifted, tile_A, tile_C, tile_B
        )
        xmu = tl.load(x + at, mask=loaded, other=0.0).to(tl.float32) - mean_c
        gradient = tl.load(dy + at, mask=loaded, other=0.0).to(tl.float32)
        counts = inside
        if mask is not None:
            counts = counts & (tl.load(mask + place, mask=inside, other=0) != 0)
        opened = counts
        if relu:
            if y is None:
                z = affine(xmu, invstd_c, weight_c, bias_c)
            else:
                z = tl.load(y + at, mask=loaded, other=0.0).to(tl.float32)
            opened = counts & ((z <= 0) == 0)  # NaN passes, as in torch
        gradient = tl.where(opened, gradient, 0.0)
        if y is not None:
            tl.store(dz + at, gradient.to(dz.dtype.element_ty), mask=inside)
        sum_dz += gradient
        # Not the product alone: what is behind the mask may be infinite.
        sum_dz_xmu += tl.where(counts, gradient * xmu, 0.0)

    mine = partial + part * 2 * C + channel
    tl.store(mine, sum_over_tile(sum_dz), mask=exists)
    tl.store(mine + C, sum_over_tile(sum_dz_xmu), mask=exists)
    if is_last(arrived + group, parts):
        _pack_sums(partial, packed, d_weight, d_bias, invstd_c, tag, channel, C, parts, chunk, tile_C)


@triton.jit
def _pack_sums(
    partial, packed, d_weight, d_bias, invstd_c, tag, channel, C, parts, chunk: tl.constexpr, tile_C: tl.constexpr
):
    sum_dz = tl.zeros((chunk, tile_C, 1), tl.float32)
    sum_dz_xmu = tl.zeros((chunk, tile_C, 1), tl.float32)
    for start in range(0, parts, chunk):
        part = start + tl.arange(0, chunk)[:, None, None]
        exists = (part < parts) & (channel < C)
        at = partial + part * 2 * C + channel
        sum_dz += tl.load(at, mask=exists, other=0.0, cache_modifier=".cg")
        sum_dz_xmu += tl.load(at + C, mask=exists, other=0.0, cache_modifier=".cg")
    total_dz, total_dz_xmu = sum_over_tile(sum_dz), sum_over_tile(sum_dz_xmu)
    exists = channel < C
    tl.store(packed + channel, total_dz, mask=exists)
    tl.store(packed + C + channel, total_dz_xmu, mask=exists)
    tl.store(packed + 2 * C + channel, tl.full(channel.shape, 1.0, tl.float32) * tag, mask=channel == 0)
    if d_bias is not None:
        tl.store(d_bias + channel, total_dz.to(d_bias.dtype.element_ty), mask=exists)
    if d_weight is not None:
        tl.store(d_weight + channel, (total_dz_xmu * invstd_c).to(d_weight.dtype.element_ty), mask=exists)


def finish(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    packed: Tensor,
    count: Tensor,
    relu: bool,
    tag_sum: float,
    mismatch: Tensor,
    number: int,
    dx: Tensor,
) -> None:
    """``dx = weight * invstd * (dz - sum_dz / N - (x - mean) * invstd^2 * sum_dz_xmu / N)`` in one launch.

    If the ranks' tags do not add up to ``tag_sum``, dx is NaN and ``number`` is stored in ``mismatch``.

    Args:
        dy: like x; the ``dz`` of :func:`pack_sums` if that returned one.
        x: as in :func:`pack_sums`, and so are mean, invstd, weight, bias and mask. It may be empty: the tags are
            compared all the same.
        packed: (2C + 1), the sum over all ranks of the rows of :func:`pack_sums`.
        count: N, (), fp64, from ``triton_forward.merge``.
        relu: whether ``dz`` is to be computed from dy and x; False if dy is already dz, or if there is no ReLU.
        tag_sum: expected at the end of ``packed``.
        mismatch: as in ``triton_forward.merge``, and so is number.
        dx: like x; written, zero where the mask is False.
    """
    n = row_tiles(x)
    launch(
        _finish_kernel, (n.programs, 1),
        dy, x, mean, invstd, weight, bias, mask, packed, count, dx, tag_sum, mismatch, number,
        x.size(1), relu, *n,
    )  # fmt: skip


@triton.jit(do_not_specialize=[*SIZES, "number"])
def _finish_kernel(
    dy, x, mean, invstd, weight, bias, mask, packed, count, dx, tag_sum, mismatch, number, C,
    relu: tl.constexpr, A, R, B,
    vector: tl.constexpr, group: tl.constexpr, tile_A: tl.constexpr, tile_R: tl.constexpr,
):  # fmt: skip
    # Tiles in reverse order: the end of x is what the kernel before has left in the L2 cache.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    at, inside, channel, exists, place = row_tile(tile, A, R, B, vector, group, tile_A, tile_R)
    in_step = tl.load(packed + 2 * C) == tag_sum
    if (tile == 0) & (in_step == 0):
        tl.store(mismatch, number)
    per_value = 1.0 / tl.maximum(tl.load(count).to(tl.float32), 1.0)
    invstd_c = per_channel(invstd, channel, exists, 0.0)
    weight_c = per_channel(weight, channel, exists, 1.0)
    mean_dz = per_channel(packed, channel, exists, 0.0) * per_value
    slope = invstd_c * invstd_c * per_channel(packed + C, channel, exists, 0.0) * per_value
    scale = tl.where(in_step, weight_c * invstd_c, float("nan"))

    xmu = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) - per_channel(mean, channel, exists, 0.0)
    dz = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
    if relu:
        z = affine(xmu, invstd_c, weight_c, per_channel(bias, channel, exists, 0.0))
        dz = tl.where(z <= 0, 0.0, dz)
    gradient = (dz - mean_dz - xmu * slope) * scale
    if mask is not None:
        gradient = tl.where(tl.load(mask + place, mask=inside, other=0) != 0, gradient, 0.0)
    tl.store(dx + at, gradient.to(dx.dtype.element_ty), mask=inside)
