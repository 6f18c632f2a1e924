"""The shapes of the layer benchmark, a rank's input each. The only place that lists any."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from syncnorm.errors import InputError

Shape = tuple[int, ...]

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

CPU_SHAPES: tuple[Shape, ...] = (
    (64, 512),  # an MLP's: the work is nothing, the collectives are all
    (4, 512, 7, 7),  # the last stage of a ResNet at 224 pixels
    (8, 256, 14, 14),
    (4, 128, 28, 28),
    (8, 64, 56, 56),
    (2, 64, 128, 128),  # detection and segmentation: few images, large ones
    (16, 64, 56, 56),  # 12 MiB: beyond the caches of most cores
    (2, 16, 16, 32, 32),  # volumes
)

# Out of batches 8, 32, 128, widths 64, 256, 1024, sides 7 to 112: from where launches are all the cost to 400 MiB.
CUDA_SHAPES: tuple[Shape, ...] = (
    (8, 64, 7, 7),
    (8, 256, 7, 7),
    (8, 64, 14, 14),
    (8, 64, 28, 28),
    (32, 1024, 7, 7),
    (32, 256, 14, 14),
    (8, 64, 56, 56),
    (32, 256, 28, 28),
    (128, 1024, 14, 14),
    (32, 64, 112, 112),
    (128, 256, 56, 56),
)
MAX_BYTES = 2**31  # of one tensor; a peer keeps several


def rows(device: str, shapes: Sequence[Shape] | None, dtype: str) -> Iterator[tuple[Shape, str]]:
    """(shape, memory format) of each row: ``shapes``, or the device's table; images in both formats."""
    table = CUDA_SHAPES if device == "cuda" else CPU_SHAPES
    for shape in table if shapes is None else shapes:
        if math.prod(shape) * DTYPES[dtype].itemsize <= MAX_BYTES:
            yield shape, "contiguous"
            if len(shape) == 4:
                yield shape, "channels_last"


def parse_shapes(text: str) -> tuple[Shape, ...]:
    """Reads ``"4,8,5,5;64,512"``.

    Raises:
        InputError: no positive whole numbers, 2 to 5 of them a shape, more than one value a channel.

    Example:
        >>> parse_shapes("4,8,5,5;64,512")
        ((4, 8, 5, 5), (64, 512))
    """
    shapes = []
    for part in text.split(";"):
        try:
            shape = tuple(int(number) for number in part.split(","))
        except ValueError:
            shape = ()
        if not 2 <= len(shape) <= 5 or min(shape) < 1 or math.prod(shape) == shape[1]:
            raise InputError(
                f"{part!r} is no shape: give 2 to 5 whole numbers with more than one value a channel, such as 4,8,5,5"
            )
        shapes.append(shape)
    return tuple(shapes)
