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

# The stages of a ResNet-50 at 224 pixels, batches 8, 32 and 256: from where launches are all the cost to 784 MiB.
CUDA_SHAPES: tuple[Shape, ...] = (
    (8, 64, 7, 7),  # no stage: the least work of all
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
MAX_BYTES = 2**30  # of one tensor of a table; a peer keeps several
TABLES = {"cpu": CPU_SHAPES, "gpu": CUDA_SHAPES}


def rows(device: str, shapes: Sequence[Shape] | None) -> Iterator[tuple[Shape, str]]:
    """(shape, memory format) of each row: ``shapes``, or the device's table; images in both formats."""
    table = CUDA_SHAPES if device == "cuda" else CPU_SHAPES
    for shape in table if shapes is None else shapes:
        yield shape, "contiguous"
        if len(shape) == 4:
            yield shape, "channels_last"


def parse_shapes(text: str) -> tuple[Shape, ...]:
    """Reads ``"4,8,5,5;64,512"``, or the name of a table: ``"cpu"`` or ``"gpu"``.

    Raises:
        InputError: no positive whole numbers, 2 to 5 of them a shape, more than one value a channel.

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
                f"{part!r} is no shape: give 2 to 5 whole numbers with more than one value a channel, such as "
                f"4,8,5,5, or one table, {' or '.join(TABLES)}"
            )
        shapes.append(shape)
    return tuple(shapes)
