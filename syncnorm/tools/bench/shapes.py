"""The shapes of the benchmarks, each of the input of one rank. No other file lists shapes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from syncnorm.errors import InputError

Shape = tuple[int, ...]

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

CPU_SHAPES: tuple[Shape, ...] = (
    (64, 512),  # of an MLP: the collectives are nearly the whole cost
    (4, 512, 7, 7),  # the last stage of a ResNet at 224 pixels
    (8, 256, 14, 14),
    (4, 128, 28, 28),
    (8, 64, 56, 56),
    (2, 64, 128, 128),  # detection and segmentation: few images, large ones
    (16, 64, 56, 56),  # 12 MiB: larger than the caches of most cores
    (2, 16, 16, 32, 32),  # volumes
)

# The stages of a ResNet-50 at 224 pixels, batches 8, 32 and 256: from inputs for which kernel launches are the whole
# cost to 784 MiB.
CUDA_SHAPES: tuple[Shape, ...] = (
    (8, 64, 7, 7),  # not a stage: the smallest input
    (8, 512, 7, 7),
    (8, 256, 14, 14),
    (8, 128, 28, 28),
    (8, 64, 56, 56),
    (8, 64, 112, 112),
    (32, 2048, 7, 7),
    (32, 1024, 14, 14),
    (32, 512, 28, 28),
    (32, 256, 56, 56),
    (256, 2048, 7, 7),
    (256, 1024, 14, 14),
    (256, 512, 28, 28),
    (256, 64, 112, 112),
)
MAX_BYTES = 2**30  # of one tensor of a table; a contender keeps several
TABLES = {"cpu": CPU_SHAPES, "gpu": CUDA_SHAPES}

# Of the scaling benchmark: images so small that communication is nearly the whole cost.
_SCALING_BATCH, _SCALING_SIDE = 4, 4
SCALING_PLACES = _SCALING_BATCH * _SCALING_SIDE**2  # elements per channel


def scaling_shape(channels: int) -> Shape:
    """The input of a layer of the scaling benchmark."""
    return (_SCALING_BATCH, channels, _SCALING_SIDE, _SCALING_SIDE)


def rows(device: str, shapes: Sequence[Shape] | None) -> Iterator[tuple[Shape, str]]:
    """(shape, memory format) of each row: of ``shapes`` or of the device's table; images in both memory formats."""
    table = CUDA_SHAPES if device == "cuda" else CPU_SHAPES
    for shape in table if shapes is None else shapes:
        yield shape, "contiguous"
        if len(shape) == 4:
            yield shape, "channels_last"


def parse_shapes(text: str) -> tuple[Shape, ...]:
    """Reads ``"4,8,5,5;64,512"``, or the name of a table: ``"cpu"`` or ``"gpu"``.

    Raises:
        InputError: a shape is not 2 to 5 positive integers, or has only one value per channel.

    Example:
        >>> parse_shapes("4,8,5,5;64,512")
        ((4, 8, 5, 5), (64, 512))
    """
    if text in TABLES:
        return TABLES[text]
    shapes = []
    for part in text.split(";"):
        try:
            shape = tuple(int(number) for number in part.split(","))
        except ValueError:
            shape = ()
        if not 2 <= len(shape) <= 5 or min(shape) < 1 or math.prod(shape) == shape[1]:
            raise InputError(
                f"{part!r} is not a shape: expected 2 to 5 positive integers with more than one value per channel, "
                f"such as 4,8,5,5, or the name of a table, {' or '.join(TABLES)}"
            )
        shapes.append(shape)
    return tuple(shapes)
