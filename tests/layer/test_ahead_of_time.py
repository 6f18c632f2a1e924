"""The Triton kernels compiled for GPUs that are not there: that they compile, and what the compiled code is like."""

import itertools
from collections.abc import Iterator, Sequence
from importlib.metadata import version

import pytest
import torch
from torch import Tensor
from versions import why_no_compiler

if reason := why_no_compiler():
    pytest.skip(reason, allow_module_level=True)

from syncnorm.layer.kernels.tiles import ChannelTiles, channel_tiles, row_tiles
from syncnorm.layer.kernels.triton_backward import finish, pack_sums
from syncnorm.layer.kernels.triton_forward import merge, normalize, pack_moments
from syncnorm.layer.moments import Running
from tests.support.stand_in_gpu import Launch, StandInGpu, access_bytes, computes_in_fp64, resources, stand_in_gpu

THREADS = 128  # of a program
# Of a thread: 4 programs and more run on a multiprocessor at a time, and nothing is spilled. Other versions of Triton
# than the one in constraints.txt allocate otherwise: 3 programs, and 8 bytes are spilled in some kernels.
TUNED = version("triton").startswith("3.7.")
MAX_REGISTERS, MAX_STACK = (128, 0) if TUNED else (168, 8)
MAX_REGISTERS_SHIFTED = max(144, MAX_REGISTERS)  # of the moments of rows that begin anywhere: each has an address

# (shape, whether the channel is the fastest axis)
SHAPES = [
    ((32, 64, 56, 56), False),
    ((32, 64, 14, 14), False),  # rows of 392 bytes in half precision
    ((32, 64, 7, 7), False),  # rows that begin at any value
    ((4, 64, 25, 33), False),  # the same, and longer than a tile
    ((32, 24, 14, 14), True),  # C is not divisible by 16
    ((4096, 1024), False),
]
FACTORS = {
    "shape": SHAPES,
    "dtype": [torch.float32, torch.bfloat16, torch.float16],
    "parameters": [(True, True), (False, True), (True, False), (False, False)],  # weight, bias
    "block": [(False, False), (True, False), (False, True), (True, True)],  # shortcut, ReLU
    "masked": [False, True],
    "parameter_dtype": [torch.float32, torch.bfloat16],
    "momentum": [0.1, None],
    "sm": [80, 90],
}
NAMES = ["_moments_kernel", "_merge_kernel", "_normalize_kernel", "_sums_kernel", "_finish_kernel"]


def pairwise(factors: dict[str, list]) -> Iterator[dict]:
    """Rows of one value of each factor, so that any two values of two factors meet in a row."""
    names = list(factors)
    sizes = [range(len(values)) for values in factors.values()]
    axes = list(itertools.combinations(range(len(names)), 2))
    missing = {(i, j, a, b) for i, j in axes for a in sizes[i] for b in sizes[j]}
    while missing:
        row: dict[int, int] = {}
        # Begin with a pair that is missing, then choose the value of each factor that meets most missing ones.
        i, j, row[i], row[j] = min(missing)
        for k in set(range(len(names))) - {i, j}:
            row[k] = max(
                sizes[k],
                key=lambda v, k=k: sum(
                    (min(k, o), max(k, o), *((v, w) if k < o else (w, v))) in missing for o, w in row.items()
                ),
            )
        missing -= {(i, j, row[i], row[j]) for i, j in axes}
        yield {names[k]: factors[names[k]][v] for k, v in row.items()}


def meta(*shape: int, dtype: torch.dtype = torch.float32, channels_last: bool = False) -> Tensor:
    t = torch.empty(shape, dtype=dtype, device="meta")
    return t.to(memory_format=torch.channels_last) if channels_last else t


def run_step(
    shape: Sequence[int],
    channels_last: bool = False,
    dtype: torch.dtype = torch.float32,
    parameters: tuple[bool, bool] = (True, True),
    block: tuple[bool, bool] = (False, False),
    masked: bool = False,
    parameter_dtype: torch.dtype = torch.float32,
    momentum: float | None = 0.1,
    number: int = 1,
) -> Tensor:
    """What a rank launches in a training step. Returns x."""
    shortcut, relu = block
    C = shape[1]
    x, y, dy, dx, residual = (meta(*shape, dtype=dtype, channels_last=channels_last) for _ in range(5))
    weight, bias = (meta(C, dtype=parameter_dtype) if there else None for there in parameters)
    d_weight, d_bias = (None if v is None else torch.empty_like(v) for v in (weight, bias))
    mask = meta(shape[0], *shape[2:], dtype=torch.bool) if masked else None
    mismatch = meta(dtype=torch.int64)
    running = Running(meta(C), meta(C), meta(dtype=torch.int64), momentum)

    packed = pack_moments(x, 1e-5, 7.0, mask)
    assert packed.shape == (2 * C + 2,)
    mean, invstd, _, count = merge(meta(8, 2 * C + 2), 1e-5, 7.0, mismatch, number, running)
    normalize(x, mean, invstd, weight, bias, residual if shortcut else None, mask, relu, y)

    kept = y if shortcut and relu else None
    sums, dz = pack_sums(dy, x, mean, invstd, weight, bias, kept, mask, relu, 7.0, d_weight, d_bias)
    begun, rectify = (dy, relu) if dz is None else (dz, False)
    finish(begun, x, mean, invstd, weight, bias, mask, sums, count, rectify, 56.0, mismatch, number, dx)
    return x


def assert_good_code(launch: Launch, most_registers: int = MAX_REGISTERS) -> None:
    used = resources(launch.kernel)
    assert used.stack <= MAX_STACK, f"{launch.name} spills: {used}"
    assert used.local == 0, f"{launch.name} spills: {used}"
    assert used.registers <= most_registers, f"{launch.name}: {used}"
    assert computes_in_fp64(launch.kernel) == (launch.name == "_merge_kernel"), launch.name
    assert launch.grid[1:] == (1, 1), launch  # along x there may be 2**31 - 1 programs, along y 65,535


def assert_wide(launch: Launch, tile: int, itemsize: int, reads: int, writes: int) -> None:
    """A thread reads and writes its part of a tile, of so many tensors like x, in units of 16 bytes.

    Args:
        launch: what to check.
        tile: values in a tile.
        itemsize: bytes of a value.
        reads: tensors like x that the kernel reads.
        writes: those that it writes.
    """
    per_tensor = tile * itemsize // (THREADS * 16)
    assert per_tensor > 0
    for instruction, tensors in (("ld", reads), ("st", writes)):
        widths = access_bytes(launch.kernel, instruction)
        assert widths.count(16) >= per_tensor * tensors, f"{launch.name} {instruction}: {sorted(widths)}"


def values_of(tiles: ChannelTiles) -> int:
    return tiles.tile_A * tiles.tile_C * tiles.tile_B


@pytest.mark.parametrize("row", list(pairwise(FACTORS)), ids=lambda row: "-".join(map(str, row.values())))
def test_every_kind_of_step_compiles_well(row):
    shape, channels_last = row["shape"]
    factors = {name: value for name, value in row.items() if name not in ("shape", "sm")}
    with stand_in_gpu(row["sm"]) as gpu:
        x = run_step(shape, channels_last, **factors)
    assert gpu.names() == NAMES  # 3 launches forward, 2 backward
    moments, _, normalization, sums, finishing = gpu.launches
    shifted = channel_tiles(x, "moments").shifted
    assert_good_code(moments, MAX_REGISTERS_SHIFTED if shifted else MAX_REGISTERS)
    for launch in gpu.launches[1:]:
        assert_good_code(launch)

    assert "max.f32" not in normalization.kernel.asm["ptx"]  # of NaN and 0 that is 0
    shortcut, relu = row["block"]
    both = shortcut and relu
    of_rows, smaller = row_tiles(x), channel_tiles(x, "moments", row["masked"])
    of_channels = channel_tiles(x, "sums", row["masked"] or both)
    row_values = of_rows.tile_A * of_rows.tile_R
    assert_wide(moments, values_of(smaller), x.itemsize, 1, 0)
    assert_wide(normalization, row_values, x.itemsize, 2 if shortcut else 1, 1)
    # The gradient of a shortcut is stored wide where no row begins within 16 bytes.
    assert_wide(
        sums, values_of(of_channels), x.itemsize, 3 if both else 2, 1 if both and not of_channels.shifted else 0
    )
    assert_wide(finishing, row_values, x.itemsize, 2, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("shape", "channels_last"),
    [((4, 5, 6, 7), True), ((32, 21, 14, 14), True), ((4, 70_000), False), ((2, 70_000, 2, 2), False)],
    ids=str,
)
def test_odd_channels_and_tiles_of_few_values_compile(shape, channels_last, dtype):
    with stand_in_gpu() as gpu:
        run_step(shape, channels_last, dtype)
    assert gpu.names() == NAMES


def test_where_no_two_values_can_be_loaded_at_once():
    with stand_in_gpu() as gpu:
        run_step((31, 5, 9, 9), dtype=torch.bfloat16, block=(True, True), masked=True)
    for launch in gpu.launches:
        assert_good_code(launch)


@pytest.mark.parametrize("sm", [75, 86, 89, 100, 120])
def test_other_gpus(sm):
    with stand_in_gpu(sm) as gpu:
        run_step((32, 64, 7, 7), dtype=torch.float16, block=(True, True), masked=True, momentum=None)
    assert gpu.names() == NAMES
    for launch in gpu.launches:
        assert_good_code(launch)


def compiled(gpu: StandInGpu) -> set[str]:
    return {launch.kernel.hash for launch in gpu.launches}


def test_another_batch_size_or_call_compiles_nothing_anew():
    with stand_in_gpu() as gpu:
        run_step((32, 64, 14, 14), number=1)
        before = compiled(gpu)
        for batch, number in ((33, 16), (40, 17), (47, 2**20)):
            run_step((batch, 64, 14, 14), number=number)
    assert compiled(gpu) == before


def test_many_channels():
    with stand_in_gpu() as gpu:
        run_step((2, 70_000, 3, 3))
    for launch in gpu.launches:
        assert launch.grid[1:] == (1, 1)
