"""What a layer refuses, in words: what was got, what was expected, on which rank."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from syncnorm.errors import InputError
from syncnorm.moments import Count


def check_input(input: Tensor, channels: int | None = None) -> None:
    """Refuses what no rank could normalise.

    Args:
        input: to be (batch, C, *spatial), floating.
        channels: the C to expect; None for any.

    Raises:
        InputError: with this rank, what was got and what was expected.
    """
    if input.dim() < 2:
        raise InputError(f"{where()}expected at least 2 dimensions (batch, channels, ...), got {shape(input)}")
    if not input.is_floating_point():
        raise InputError(f"{where()}expected a floating-point input, got {input.dtype}; convert it first")
    if input.size(1) == 0 or input.size(1) != (channels or input.size(1)):
        raise InputError(
            f"{where()}expected {channels or 'some'} channels in dimension 1, "
            f"got {input.size(1)}: input of {shape(input)}"
        )


def check_vectors(input: Tensor, **vectors: Tensor | None) -> None:
    """Refuses parameters and buffers that do not have one value a channel of ``input``.

    Raises:
        InputError: with the name of the first such vector.
    """
    for name, vector in vectors.items():
        if vector is not None and vector.shape != (input.size(1),):
            raise InputError(
                f"{where()}expected {name} to have one value for each of {input.size(1)} channels "
                f"(input of {shape(input)}), got {shape(vector)}"
            )
    if (vectors["running_mean"] is None) != (vectors["running_var"] is None):
        raise InputError("running_mean and running_var come together: one is None, the other is not")


def check_mask(input: Tensor, mask: Tensor | None) -> None:
    """Refuses a mask of the wrong kind.

    Raises:
        InputError: not boolean, or not broadcastable to (batch, *spatial).
    """
    if mask is None:
        return
    expected = (input.size(0), *input.shape[2:])
    fits = mask.dim() <= len(expected) and all(
        m in (1, n) for m, n in zip(reversed(mask.shape), reversed(expected), strict=False)
    )
    if mask.dtype != torch.bool or not fits:
        raise InputError(
            f"{where()}expected a boolean mask that broadcasts to (batch, *spatial) = {expected}, "
            f"got {mask.dtype} of {shape(mask)}"
        )


def check_count(counts: Sequence[int] | Tensor, local_count: Count) -> None:
    """Refuses a global batch of one value a channel, on all ranks alike.

    All ranks empty is no error: there is nothing to normalise, and nothing is.

    Args:
        counts: of all ranks: numbers, or a tensor where only the device knows them.
        local_count: that of this rank.

    Raises:
        InputError: the whole batch has one value a channel. On a GPU it is the device that says so, without the host
            waiting for it: an assertion that fails there ends the process's use of CUDA.
    """
    if not isinstance(counts, Tensor):
        if sum(counts) == 1:
            raise _one_value(local_count)
        return
    # A rank that holds two values knows the answer. Where the total is one no rank holds two, so all of them look.
    if not isinstance(local_count, Tensor) and local_count > 1:
        return
    refused = _one_value(local_count)
    try:
        torch._assert_async(counts.sum() != 1, str(refused))
    except RuntimeError as error:
        raise refused from error


def _one_value(local_count: Count) -> InputError:
    here = "" if isinstance(local_count, Tensor) else f" ({local_count} of them on this rank)"
    return InputError(f"{where()}expected more than 1 value per channel over all ranks in training, got 1{here}")


def where() -> str:
    """``"rank 3: "`` for the head of a message, or nothing outside distributed runs."""
    if dist.is_initialized():
        return f"rank {dist.get_rank()}: "
    return ""


def shape(tensor: Tensor) -> str:
    """A shape as users write it."""
    return f"shape {tuple(tensor.shape)}"
