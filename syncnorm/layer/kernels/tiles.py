"""How a tensor is divided among the programs of a Triton kernel.

A dense x is (A, C, B) in memory: (samples, channels, positions) if it is contiguous, (samples * positions, channels,
1) if the channel is the fastest axis. There are two divisions, because the passes have two needs:

- :class:`RowTiles`, for passes that write a tensor like x: tiles of whole rows of R = C * B values. Where channels
  begin is irrelevant to loads and stores, which are wide even if B is 7 * 7.
- :class:`ChannelTiles`, for passes that sum over each channel: a program keeps to a few channels, and several
  programs, the parts, share the tiles of these.

A GPU loads up to 16 bytes at once, but only if the compiler can prove that addresses and bounds are multiples of
that. Triton proves it for an argument that is a multiple of 16, which C and B rarely are; so each division has
``vector``, the number of values at once that it permits, as a constexpr.
"""

import functools
import math
from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_LOAD_BYTES = 16
_ROW_TILE_BYTES = 8192
_NEIGHBORS = 32  # channels of a tile, if the channel is the fastest axis: two sectors of a cache line or more
_PARTS = 512  # of a channel: the last program reads the results of all of them
_CHUNK_VALUES = 1024  # that it reads at once
_MULTIPROCESSORS = 132  # of a device that is none; of an H100


class _Sums(NamedTuple):
    """What was fastest for a kernel that sums over each channel, on an H100, of tiles of 2 to 8 KiB.

    Attributes:
        tile_bytes: of a tile; the sums of a program are tiles too, in registers.
        programs: for each multiprocessor, of x in half precision and in fp32. As many as run at a time, by their
            registers: further ones would run when these are done, on a GPU that is nearly empty.
        tiles: that a program takes at least, if there are four programs for a channel.
    """

    tile_bytes: int
    programs: tuple[int, int]
    tiles: int


# By kernel and by what a tile holds: the rows of a channel, rows that begin within a load, or neighboring channels.
_SUMS = {
    ("moments", "rows"): _Sums(4096, (5, 8), 8),
    ("moments", "shifted"): _Sums(4096, (5, 6), 8),
    ("moments", "neighbors"): _Sums(4096, (4, 5), 8),
    ("sums", "rows"): _Sums(4096, (8, 8), 1),
    ("sums", "shifted"): _Sums(4096, (6, 8), 1),
    ("sums", "neighbors"): _Sums(8192, (4, 5), 1),
}

# Arguments for which Triton must not compile a variant of the kernel at each value that 16 divides.
SIZES = ("A", "C", "R", "tiles_B", "parts")


class RowTiles(NamedTuple):
    """x as A rows of R values.

    Attributes:
        A: number of rows.
        R: C * B.
        B: values in a row that belong to one channel.
        vector: values per load.
        group: neighbors that certainly belong to one channel: ``vector`` or 1.
        tile_A: rows of a tile, a power of two.
        tile_R: values of a row in a tile, a power of two.
    """

    A: int
    R: int
    B: int
    vector: int
    group: int
    tile_A: int
    tile_R: int

    @property
    def programs(self) -> int:
        """The number of tiles; one even for an empty x."""
        return max(1, cdiv(self.A, self.tile_A) * cdiv(self.R, self.tile_R))


class ChannelTiles(NamedTuple):
    """x as tiles of a few channels each, of which several programs take every ``parts``-th.

    Attributes:
        A: as in the description of this file, and so are C and B.
        tiles_B: tiles of each row of B values.
        parts: programs for each tile of channels.
        vector: values per load.
        shifted: rows of B values may begin within a load.
        tile_A: rows of a tile, a power of two; and so are the others.
        tile_C: its channels.
        tile_B: its positions.
        chunk: parts that are added up at once, a power of two.
    """

    A: int
    C: int
    B: int
    tiles_B: int
    parts: int
    vector: int
    shifted: bool
    tile_A: int
    tile_C: int
    tile_B: int
    chunk: int

    @property
    def tiles_C(self) -> int:
        """The number of tiles of channels."""
        return cdiv(self.C, self.tile_C)


def row_tiles(x: Tensor) -> RowTiles:
    """The division of a dense x for a pass that writes a tensor like it."""
    return _row_tiles(x.shape, x.stride(1) == 1, x.itemsize)


def channel_tiles(x: Tensor, kernel: Literal["moments", "sums"], small: bool = False) -> ChannelTiles:
    """The division of a dense x for a pass that sums over each channel.

    Args:
        x: dense; it may be empty.
        kernel: which pass.
        small: for a variant of it that needs more registers per value.
    """
    return _channel_tiles(x.shape, x.stride(1) == 1, x.itemsize, kernel, small, _multiprocessors(x.device))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return _MULTIPROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.lru_cache(1024)
def _row_tiles(shape: tuple[int, ...], channel_is_fastest: bool, itemsize: int) -> RowTiles:
    A, C, B = _rows_channels_positions(shape, channel_is_fastest)
    R = C * B
    vector = math.gcd(R, _LOAD_BYTES // itemsize)
    group = vector if B % vector == 0 else 1
    # What depends on the channel is computed once per column of a tile: prefer many rows, if a warp has columns.
    values = _ROW_TILE_BYTES // itemsize // (2 if vector == 1 else 1)  # each load needs registers for its address
    tile_R = min(power_of_2(R), values // min(power_of_2(A), values // 256))
    tile_A = min(power_of_2(A), values // tile_R)
    return RowTiles(A, R, B, vector, group, tile_A, tile_R)


@functools.lru_cache(1024)
def _channel_tiles(
    shape: tuple[int, ...], channel_is_fastest: bool, itemsize: int, kernel: str, small: bool, multiprocessors: int
) -> ChannelTiles:
    A, C, B = _rows_channels_positions(shape, channel_is_fastest)
    # Of all values: no load may reach past the end of x.
    vector = math.gcd(C if B == 1 else A * C * B, _LOAD_BYTES // itemsize)
    if C * max(B, _ROW_TILE_BYTES) >= 2**31:  # offsets in a tile of shifted rows must fit into 32 bits
        vector = math.gcd(vector, C if B == 1 else B)
    shift = 0 if B == 1 else vector - math.gcd(B, vector)  # the most values by which a row begins within a load
    tuned = _SUMS[kernel, "neighbors" if B == 1 else "shifted" if shift else "rows"]
    values = tuned.tile_bytes // itemsize // (2 if small or vector == 1 else 1)
    if B == 1:
        tile_C, tile_B = min(power_of_2(C), _NEIGHBORS), 1
    else:
        tile_B = min(power_of_2(B + shift), values)
        # Short rows: several channels, because neighboring rows share cache lines.
        tile_C = min(power_of_2(C), max(1, values // 4 // tile_B))
    tile_A = min(power_of_2(A), values // (tile_C * tile_B))
    tiles_B = cdiv(B + shift, tile_B)
    tiles = cdiv(A, tile_A) * tiles_B
    programs = multiprocessors * tuned.programs[itemsize // 4]
    parts = min(max(cdiv(tiles, tuned.tiles), min(tiles, 4)), _PARTS, programs // cdiv(C, tile_C))
    chunk = min(_PARTS, _CHUNK_VALUES // tile_C)
    return ChannelTiles(A, C, B, tiles_B, max(1, parts), vector, shift > 0, tile_A, tile_C, tile_B, chunk)


def _rows_channels_positions(shape: tuple[int, ...], channel_is_fastest: bool) -> tuple[int, int, int]:
    C = shape[1]
    values = math.prod(shape)
    if channel_is_fastest or len(shape) == 2 or values == 0:
        return values // C, C, 1
    return shape[0], C, values // (shape[0] * C)


def cdiv(n: int, by: int) -> int:
    """``n / by``, rounded up."""
    return -(-n // by)


def power_of_2(n: int) -> int:
    """The smallest one that is at least n and 1."""
    return 1 << (max(n, 1) - 1).bit_length()


@triton.jit
def row_tile(
    tile, A, R, B, vector: tl.constexpr, group: tl.constexpr, tile_A: tl.constexpr, tile_R: tl.constexpr
):  # fmt: skip
    """The tile with this index, as (tile_A, tile_R / group, group).

    Returns:
        Offsets of its values; which of them are inside x; their channels, and which of these exist, each
        (1, tile_R / group, 1); and their offsets in a mask of (A, B) positions.
    """
    R = R // vector * vector  # R itself, and now the compiler knows what divides it
    tiles_R = tl.cdiv(R, tile_R)
    a = (tile // tiles_R).to(tl.int64) * tile_A + tl.arange(0, tile_A)[:, None, None]
    start = (tile % tiles_R).to(R.dtype) * tile_R
    column = tl.arange(0, tile_R // group)[None, :, None] * group
    within = tl.arange(0, group)[None, None, :]
    from_channel = start % B + column
    channel = start // B + from_channel // B
    position = from_channel % B + within
    exists = start + column < R
    inside = (a < A) & (start + column + within < R)
    return a * R + (start + column + within), inside, channel, exists, a * B + position


@triton.jit
def channel_tile(
    tile, c, A, C, B, tiles_B, vector: tl.constexpr, shifted: tl.constexpr,
    tile_A: tl.constexpr, tile_C: tl.constexpr, tile_B: tl.constexpr,
):  # fmt: skip
    """The tile with this index over A and B, of the channels from ``c`` on, as (tile_A, tile_C, tile_B).

    Returns:
        Offsets of its values; which of them may be loaded; which belong to the channel; and their offsets in a mask
        of (A, B) positions. More may be loaded than belongs to the channel: a row that begins within a load is read
        from the beginning of that load.
    """
    a = (tile // tiles_B).to(tl.int64) * tile_A + tl.arange(0, tile_A)[:, None, None]
    column = tl.arange(0, tile_B)[None, None, :]
    if tile_B == 1:
        C = C // vector * vector  # C itself, and now the compiler knows what divides it
        channel = c + tl.arange(0, tile_C)[None, :, None]
        loaded = (a < A) & (channel < C) & (column < 1)
        at = a * C + channel + column
        inside = loaded
        place = a + column
    else:
        channel = c + tl.arange(0, tile_C)[None, :, None]
        row_exists = (a < A) & (channel < C)
        start = (tile % tiles_B).to(B.dtype) * tile_B
        if shifted:
            # Offsets from the tile's first row fit into 32 bits (``_channel_tiles``), which takes far less time.
            base = (tile // tiles_B).to(tl.int64) * tile_A * C * B
            before = base // vector * vector
            row = (tl.arange(0, tile_A)[:, None, None] * C + channel) * B + (base - before).to(tl.int32)
            aligned = row // vector * vector
            head = row - aligned
            position = start + column - head
            # Alike for all values of a load.
            loaded = row_exists & (start + column // vector * vector - head < B)
            inside = row_exists & (position.to(tl.uint32) < B.to(tl.uint32))  # also not below 0
            at = before + (aligned + (start + column))
        else:
            B = B // vector * vector
            position = start + column
            inside = row_exists & (position < B)
            loaded = inside
            at = (a * C + channel) * B + position
        place = a * B + position
    return at, loaded, inside, place


@triton.jit
def sum_over_tile(values):
    """(tile_A, tile_C, tile_B) -> (1, tile_C, 1)."""
    return tl.sum(tl.sum(values, 2, keep_dims=True), 0, keep_dims=True)


@triton.jit
def per_channel(pointer, channel, exists, absent: tl.constexpr):
    """One fp32 value per channel; ``absent`` if there is no such parameter."""
    if pointer is None:
        values = tl.full(channel.shape, absent, tl.float32)
    else:
        values = tl.load(pointer + channel, mask=exists, other=absent).to(tl.float32)
    return values


@triton.jit
def affine(xmu, invstd, weight, bias):
    """Batch norm of ``xmu = x - mean``: in the backward the same bits, and so the same signs, as in the forward."""
    return tl.fma(xmu, invstd * weight, bias)
