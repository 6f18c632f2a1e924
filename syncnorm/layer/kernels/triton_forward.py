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
from syncnorm.layer.kernels.parts import is_last, semaphores
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
from syncnorm.layer.moments import Running

_MERGE_VALUES = 1024
_MERGE_RANKS = 64


def pack_moments(x: Tensor, eps: float, tag: float, mask: Tensor | None) -> Tensor:
    """The row that a rank sends in the forward: ``[mean (C) | invstd (C) | count | tag]``, fp32, in one launch.

    Each program sums the differences to one value of the channel, and their squares; programs are merged by Chan's
    formula. So the variance is right to fp32 rounding however far the mean is from zero.

    Args:
        x: dense (``kernels.dense``), up to fp32; empty on a rank without values, whose mean is 0 and invstd finite.
        eps: added to the variance.
        tag: identifies the call; an integer below 2**24.
        mask: (batch, *spatial), bool, contiguous: True counts. None: all count.
    """
    n = channel_tiles(x, small=mask is not None)
    packed = torch.empty(2 * n.C + 2, dtype=torch.float32, device=x.device)
    partial = packed.new_empty(n.parts, 4, n.C)
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
        # A value of each channel, from the middle of the program's first tile.
        sample_a = (part // tiles_B).to(tl.int64) * tile_A
        position = tl.minimum(part % tiles_B * tile_B + tile_B // 2, B - 1)
        sample = tl.load(x + (sample_a * C + channel) * B + position, mask=exists & (sample_a < A), other=0.0)
        origin = sample.to(tl.float32)
    else:
        # That may be padding. The first value that each thread meets which is not.
        sample = 0.0
        origin = tl.zeros((tile_A, tile_C, tile_B), tl.float32)
    count = tl.zeros((tile_A, tile_C, tile_B), tl.float32)
    sum_ = tl.zeros((tile_A, tile_C, tile_B), tl.float32)
    squares = tl.zeros((tile_A, tile_C, tile_B), tl.float32)
    # Every parts-th tile: all programs together go through x from its beginning to its end. Two tiles at a time, so
    # that enough loads are on their way, if there are registers.
    AT_A_TIME: tl.constexpr = 1 if shifted or mask is not None else 2
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
        count += inside.to(tl.float32)
        sum_ += apart
        squares += apart * apart
    total = sum_over_tile(count)
    per_value = 1.0 / tl.maximum(total, 1.0)
    if mask is not None:  # from one origin per thread to one per channel
        common = sum_over_tile(count * origin) * per_value
        shift = origin - common
        squares += shift * (2 * sum_ + count * shift)
        sum_ += count * shift
        origin = common
    step = sum_over_tile(sum_) * per_value
    m2 = sum_over_tile(squares - step * (2 * sum_ - count * step))
    mine = partial + part * 4 * C + channel
    tl.store(mine, total, mask=exists)
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
    mean, invstd, var = rows.new_empty(3, C)
    count = rows.new_empty((), dtype=torch.float64)
    tile_W = min(power_of_2(W), _MERGE_RANKS)
    tile_C = min(power_of_2(C), _MERGE_VALUES // tile_W)
    programs = cdiv(C, tile_C)
    running_mean, running_var, tracked, momentum = running or (None, None, None, 0.0)
    # The cumulative average, of which all programs need the number of batches before one of them counts up.
    arrived = semaphores(1, rows.device) if momentum is None else None
    launch(
        _merge_kernel, (programs, 1),
        rows, eps, tag, mean, invstd, var, count, mismatch, number,
        running_mean, running_var, tracked, momentum or 0.0, arrived,
        W, C, tile_W, tile_C,
    )  # fmt: skip
    return mean, invstd, var, count


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

    # From here on in fp32, as in moments.merge and update_running_.
    nan = float("nan")
    merged = mean_c.to(tl.float32)
    wide = tl.where(var_eps < eps, eps, var_eps).to(tl.float32)
    tl.store(mean + channel, tl.where(in_step, merged, nan), mask=exists)
    tl.store(invstd + channel, tl.where(in_step, tl.div_rn(1.0, tl.sqrt_rn(wide)), nan), mask=exists)
    tl.store(var + channel, tl.where(in_step, wide - eps, nan), mask=exists)
    counts = in_step & (total > 0)
    counts_up = tl.program_id(0) == 0
    if running_mean is not None:
        factor = momentum
        if arrived is not None:
            seen = tl.load(tracked) + 1
            factor = (1.0 / seen.to(tl.float64)).to(tl.float32)
            counts_up = is_last(arrived, tl.num_programs(0))
        factor = tl.where(counts, factor, 0.0)
        unbiased = ((wide - eps).to(tl.float64) * (total / tl.maximum(total - 1, 1.0))).to(tl.float32)
        _blend(running_mean + channel, merged, factor, exists)
        _blend(running_var + channel, unbiased, factor, exists)
    if counts_up:
        tl.store(count, tl.where(in_step, total, nan))
        if tracked is not None:
            tl.store(tracked, tl.load(tracked) + counts.to(tl.int64))
        if in_step == 0:
            tl.store(mismatch, number)


@triton.jit
def _blend(running, value, factor, exists):
    old = tl.load(running, mask=exists, other=0.0).to(tl.float32)
    # The two branches of torch.lerp: a factor of 1 gives exactly ``value``.
    new = tl.where(factor < 0.5, old + factor * (value - old), value - (value - old) * (1 - factor))
    # NaN times zero is NaN, and an empty batch must change nothing whatever its moments are.
    tl.store(running, tl.where(factor == 0, old, new).to(running.dtype.element_ty), mask=exists)


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
        bias: likewise.
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
