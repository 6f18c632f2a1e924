"""The forward of a synced batch norm in three kernels: moments of this rank, merge of all ranks, normalization.

The mask, the shortcut and the ReLU are parts of these kernels, so a step reads x twice and writes y once whatever it
computes. Statistics are fp32, half precision is rounded once.

Shapes: W = ranks of the group, C = channels.
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
    cdiv,
    channel_tile,
    channel_tiles,
    per_channel,
    power_of_2,
    row_tile,
    row_tiles,
    sum_over_tile,
)
from syncnorm.layer.kernels.triton_merged import outputs, running_arguments, store_merged
from syncnorm.layer.kernels.triton_sums import store_sums
from syncnorm.layer.moments import Running

_MERGE_VALUES = 1024
_MERGE_RANKS = 64


def pack_moments(x: Tensor, eps: float, tag: float, mask: Tensor | None, *, to_sum: bool = False) -> Tensor:
    """The row that a rank sends in the forward: ``[mean (C) | invstd (C) | count | tag]``, fp32, in one launch.

    Each program sums the differences to about the mean of its first values, and their squares; programs are merged by
    Chan's formula. So the variance is right to fp32 rounding however far the mean is from zero.

    Args:
        x: dense (``kernels.dense``), up to fp32; empty on a rank without values, whose mean is 0 and invstd finite.
        eps: added to the variance.
        tag: identifies the call; an integer below 2**24.
        mask: (batch, *spatial), bool, contiguous: True counts. None: all count.
        to_sum: return the row of ``global_sums`` instead, (3C + 2) in fp64, which is summed and not gathered.
    """
    n = channel_tiles(x, "moments", small=mask is not None)
    size, dtype = (3 * n.C + 2, torch.float64) if to_sum else (2 * n.C + 2, torch.float32)
    packed = torch.empty(size, dtype=dtype, device=x.device)
    partial = partial_sums(n.parts * 4 * n.C, x.device)
    launch(
        _moments_kernel, (n.tiles_C * n.parts, 1),
        x, mask, packed, partial, semaphores(n.tiles_C, x.device), eps, tag, *n,
    )  # fmt: skip
    return packed


@triton.jit(do_not_specialize=SIZES)
def _moments_kernel(
    x, mask, packed, partial, arrived, eps, tag, A, C, B, tiles_B, parts,
    vector: tl.constexpr, shifted: tl.constexpr,
    tile_A: tl.constexpr, tile_C: tl.constexpr, tile_B: tl.constexpr, chunk: tl.constexpr,
):  # fmt: skip
    tiles_C = tl.cdiv(C, tile_C)
    group, part = tl.program_id(0) % tiles_C, tl.program_id(0) // tiles_C
    channel = group * tile_C + tl.arange(0, tile_C)[None, :, None]
    exists = channel < C
    if mask is None:
        # The mean of the program's first tile: of a single value, which may be an outlier, the squares would cancel.
        at, loaded, inside, _ = channel_tile(
            part, group * tile_C, A, C, B, tiles_B, vector, shifted, tile_A, tile_C, tile_B
        )
        value = tl.load(x + at, mask=loaded, other=0.0).to(tl.float32)
        share = 1.0 / tl.maximum(sum_over_tile(inside.to(tl.float32)), 1.0)
        # As a value of x, which loads then give where there is none.
        sample = sum_over_tile(tl.where(inside, value * share, 0.0)).to(x.dtype.element_ty)
        origin = sample.to(tl.float32)
    else:
        # There may be only padding. The first value that each thread meets which is none.
        sample = 0.0
        origin = tl.zeros((tile_A, tile_C, tile_B), tl.float32)
    count = tl.zeros((tile_A, tile_C, tile_B), tl.float32)
    sum_ = tl.zeros((tile_A, tile_C, tile_B), tl.float32)
    squares = tl.zeros((tile_A, tile_C, tile_B), tl.float32)
    # Every parts-th tile: all programs together go through x from its beginning to its end. Two tiles at a time, so
    # that enough loads are on their way, if there are registers for them.
    HALF: tl.constexpr = x.dtype.element_ty != tl.float32
    AT_A_TIME: tl.constexpr = 1 if mask is not None or (shifted and HALF) else 2
    for tile in tl.range(part, tl.cdiv(A, tile_A) * tiles_B, parts, loop_unroll_factor=AT_A_TIME):
        at, loaded, inside, place = channel_tile(
            tile, group * tile_C, A, C, B, tiles_B, vector, shifted, tile_A, tile_C, tile_B
        )
        value = tl.load(x + at, mask=loaded, other=sample).to(tl.float32)
        if mask is not None:
            inside = inside & (tl.load(mask + place, mask=inside, other=0) != 0)
            origin = tl.where((count == 0) & inside, value, origin)
        apart = value - origin
        if shifted or mask is not None:
            apart = tl.where(inside, apart, 0.0)
        # The same value; which form needs fewer registers depends on the layout.
        count += tl.where(inside, 1.0, 0.0) if tile_B == 1 else inside.to(tl.float32)
        sum_ += apart
        squares += apart * apart
    mine = partial + part * 4 * C + channel
    total = sum_over_tile(count)
    # Stored at once: Triton 3.6 cannot compile this kernel for some shapes if the store comes after the other sums.
    tl.store(mine, total, mask=exists)
    per_value = 1.0 / tl.maximum(total, 1.0)
    if mask is not None:  # from one origin per thread to one per channel
        common = sum_over_tile(count * origin) * per_value
        shift = origin - common
        squares += shift * (2 * sum_ + count * shift)
        sum_ += count * shift
        origin = common
    step = sum_over_tile(sum_) * per_value
    m2 = sum_over_tile(squares - step * (2 * sum_ - count * step))
    tl.store(mine + C, origin, mask=exists)
    tl.store(mine + 2 * C, step, mask=exists)
    tl.store(mine + 3 * C, tl.where(m2 < 0, 0.0, m2), mask=exists)  # keeps NaN
    if is_last(arrived + group, parts):
        _pack_moments(partial, packed, eps, tag, channel, C, parts, chunk, tile_C)


@triton.jit
def _pack_moments(partial, packed, eps, tag, channel, C, parts, chunk: tl.constexpr, tile_C: tl.constexpr):
    count = tl.zeros((chunk, tile_C, 1), tl.float32)
    origin = tl.zeros((chunk, tile_C, 1), tl.float32)
    step = tl.zeros((chunk, tile_C, 1), tl.float32)
    m2 = tl.zeros((chunk, tile_C, 1), tl.float32)
    for start in range(0, parts, chunk):
        part = start + tl.arange(0, chunk)[:, None, None]
        exists = (part < parts) & (channel < C)
        at = partial + part * 4 * C + channel
        count_p = tl.load(at, mask=exists, other=0.0, cache_modifier=".cg")
        origin_p = tl.load(at + C, mask=exists, other=0.0, cache_modifier=".cg")
        step_p = tl.load(at + 2 * C, mask=exists, other=0.0, cache_modifier=".cg")
        m2_p = tl.load(at + 3 * C, mask=exists, other=0.0, cache_modifier=".cg")
        origin = tl.where(count == 0, origin_p, origin)
        apart = (origin_p - origin) + (step_p - step)
        share = count_p / tl.maximum(count + count_p, 1.0)
        step += apart * share
        m2 += m2_p + apart * apart * (count * share)
        count += count_p
    count, origin, step, m2 = _merged(count, origin, step, m2)
    if packed.dtype.element_ty == tl.float64:
        store_sums(packed, count, origin + step, m2, tag, channel, C)
    else:
        exists = channel < C
        # An empty rank: any finite invstd, whatever eps is.
        var_eps = tl.where(count > 0, m2 / tl.maximum(count, 1.0) + eps, 1.0)
        tl.store(packed + channel, origin + step, mask=exists)
        tl.store(packed + C + channel, tl.div_rn(1.0, tl.sqrt_rn(var_eps)), mask=exists)
        tl.store(packed + 2 * C + channel, count, mask=channel == 0)
        tl.store(packed + 2 * C + 1 + channel, tl.full(channel.shape, 1.0, tl.float32) * tag, mask=channel == 0)


@triton.jit
def _merged(count, origin, step, m2):
    """Moments of the union over the first axis, all zero if it is empty.

    A mean is the unrounded sum ``origin + step``: rounded, means that are far from zero would lose the differences
    between them, which are a part of the variance.
    """
    total = tl.sum(count, 0, keep_dims=True)
    per_value = 1.0 / tl.maximum(total, 1.0)
    origin = tl.where(count > 0, origin, 0.0)
    common = tl.sum(count * origin, 0, keep_dims=True) * per_value  # near the mean; its rounding does not matter
    apart = (origin - common) + step
    center = tl.sum(count * apart, 0, keep_dims=True) * per_value
    apart -= center
    m2 = tl.sum(m2 + count * apart * apart, 0, keep_dims=True)
    return total, common, center, m2


def merge(
    rows: Tensor, eps: float, tag: float, mismatch: Tensor, number: int, running: Running | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Moments of the global batch from those of all ranks, and the update of running statistics, in one launch.

    As ``moments.merge`` and ``moments.update_running_``. If a rank sent another tag, the results are NaN, ``running``
    stays as it is, and ``number`` is stored in ``mismatch``.

    Args:
        rows: (W, 2C + 2), fp32, as from :func:`pack_moments`.
        eps: as in :func:`pack_moments`.
        tag: that of this rank.
        mismatch: (), int64, in memory that the host can read without waiting.
        number: of the call.
        running: the running statistics to update, of fp32 or less, or None.

    Returns:
        ``mean (C), invstd (C), biased variance (C), count ()``, the count in fp64, the others in fp32.
    """
    W, width = rows.shape
    C = width // 2 - 1
    found = outputs(C, rows.device)
    tile_W = min(power_of_2(W), _MERGE_RANKS)
    tile_C = min(power_of_2(C), _MERGE_VALUES // tile_W)
    launch(
        _merge_kernel, (cdiv(C, tile_C), 1),
        rows, eps, tag, *found, mismatch, number, *running_arguments(running, rows.device), W, C, tile_W, tile_C,
    )  # fmt: skip
    return found


@triton.jit(do_not_specialize=["number", "W", "C"])
def _merge_kernel(
    rows, eps, tag, mean, invstd, var, count, mismatch, number,
    running_mean, running_var, tracked, momentum, arrived, W, C, tile_W: tl.constexpr, tile_C: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(0) * tile_C + tl.arange(0, tile_C)[None, :]
    exists = channel < C
    width = 2 * C + 2

    # In fp64: counts are exact, and the merged mean is right to half a unit in the last place of fp32.
    total = tl.zeros((tile_W, 1), tl.float64)
    weighted = tl.zeros((tile_W, tile_C), tl.float64)
    others = tl.zeros((tile_W, 1), tl.int32)
    for start in range(0, W, tile_W):
        rank = start + tl.arange(0, tile_W)[:, None]
        row = rows + rank.to(tl.int64) * width
        n = tl.load(row + 2 * C, mask=rank < W, other=0.0).to(tl.float64)
        total += n
        weighted += n * tl.load(row + channel, mask=(rank < W) & exists, other=0.0).to(tl.float64)
        others += (tl.load(row + 2 * C + 1, mask=rank < W, other=tag) != tag).to(tl.int32)
    total = tl.sum(total)
    in_step = tl.sum(others) == 0
    per_value = 1.0 / tl.maximum(total, 1.0)
    mean_c = tl.sum(weighted, 0, keep_dims=True) * per_value

    var_eps = tl.zeros((tile_W, tile_C), tl.float64)
    for start in range(0, W, tile_W):
        rank = start + tl.arange(0, tile_W)[:, None]
        row = rows + rank.to(tl.int64) * width
        n = tl.load(row + 2 * C, mask=rank < W, other=0.0).to(tl.float64)
        apart = tl.load(row + channel, mask=(rank < W) & exists, other=0.0).to(tl.float64) - mean_c
        invstd_r = tl.load(row + C + channel, mask=(rank < W) & exists, other=1.0).to(tl.float64)
        var_eps += n * per_value * (1.0 / (invstd_r * invstd_r) + apart * apart)
    var_eps = tl.sum(var_eps, 0, keep_dims=True)

    store_merged(
        mean_c, var_eps, total, in_step, eps, mean, invstd, var, count, mismatch, number,
        running_mean, running_var, tracked, momentum, arrived, channel, exists,
    )  # fmt: skip


def normalize(
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    relu: bool,
    y: Tensor,
) -> None:
    """``y = (x - mean) * invstd * weight + bias``, plus ``residual``, then ReLU; in one launch.

    Args:
        x: as in :func:`pack_moments`; nothing happens if it is empty.
        mean: (C), fp32, of the global batch.
        invstd: (C), fp32.
        weight: (C), contiguous, up to fp32, or None.
        bias: (C), contiguous, up to fp32, or None.
        residual: like x, or None.
        mask: as in :func:`pack_moments`; y is zero where it is False.
        relu: whether negative values become zero. NaN stays.
        y: like x; written.
    """
    if x.numel() == 0:
        return
    n = row_tiles(x)
    launch(_normalize_kernel, (n.programs, 1), x, mean, invstd, weight, bias, residual, mask, y, relu, *n)


@triton.jit(do_not_specialize=SIZES)
def _normalize_kernel(
    x, mean, invstd, weight, bias, residual, mask, y, relu: tl.constexpr, A, R, B,
    vector: tl.constexpr, group: tl.constexpr, tile_A: tl.constexpr, tile_R: tl.constexpr,
):  # fmt: skip
    # Tiles in reverse order: the end of x is what the kernel before has left in the L2 cache.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    at, inside, channel, exists, place = row_tile(tile, A, R, B, vector, group, tile_A, tile_R)
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    z = affine(
        value - per_channel(mean, channel, exists, 0.0),
        per_channel(invstd, channel, exists, 0.0),
        per_channel(weight, channel, exists, 1.0),
        per_channel(bias, channel, exists, 0.0),
    )
    if residual is not None:
        z += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    if relu:
        z = tl.where(z < 0, 0.0, z)  # keeps NaN, as torch.relu does
    if mask is not None:
        z = tl.where(tl.load(mask + place, mask=inside, other=0) != 0, z, 0.0)
    tl.store(y + at, z.to(y.dtype.element_ty), mask=inside)
