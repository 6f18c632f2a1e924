"""What a layer refuses, in words: what was got, what was expected, on which rank."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from syncnorm.errors import InputError, known_everywhere
from syncnorm.layer.moments import Count

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensor(input: object) -> None:
    """Refuses what is no tensor.

    Raises:
        InputError: with its class.
    """
    if not isinstance(input, Tensor):
        raise InputError(f"{where()}expected a tensor, got {type(input).__name__}")


def check_synced(input: Tensor, *vectors: Tensor | None) -> None:
    """Refuses what could be exchanged with other ranks, but not be normalized, or not be differentiated, after that.

    Args:
        input: passed :func:`check_input`.
        vectors: running statistics, weight and bias, which passed :func:`check_vectors`.

    Raises:
        InputError: no dense tensor with data, or made in inference mode and needed in a backward.
    """
    if input.is_nested or input.layout != torch.strided:
        kind = "nested tensor" if input.is_nested else f"layout {input.layout}"
        raise InputError(f"{where()}expected a dense tensor, got a {kind}; convert it first")
    if input.device.type == "meta":
        raise InputError(f"{where()}expected an input with data, got one on the meta device")
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return
    needed = torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in (input, *vectors))
    for name, tensor in zip(
        ("input", "running_mean", "running_var", "weight", "bias"), (input, *vectors), strict=True
    ):
        changed = name in ("running_mean", "running_var")
        if tensor is not None and (changed or needed) and tensor.is_inference():
            raise InputError(
                f"{where()}expected {name} to be an ordinary tensor, got one that was made in torch.inference_mode, "
                f"which autograd cannot use; clone it outside of that"
            )


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
    if input.dtype not in _DTYPES:
        raise InputError(f"{where()}expected a floating-point input, got {input.dtype}; convert it first")
    if input.size(1) == 0 or input.size(1) != (channels or input.size(1)):
        raise InputError(
            f"{where()}expected {channels or 'some'} channels in dimension 1, "
            f"got {input.size(1)}: input of {shape(input)}"
        )


def check_vectors(input: Tensor, **vectors: Tensor | None) -> None:
    """Refuses parameters and buffers that do not have one floating value a channel, where ``input`` is.

    Raises:
        InputError: with the name of the first such vector.
    """
    for name, vector in vectors.items():
        if vector is None:
            continue
        if vector.shape != (input.size(1),):
            raise InputError(
                f"{where()}expected {name} to have one value for each of {input.size(1)} channels "
                f"(input of {shape(input)}), got {shape(vector)}"
            )
        if vector.device != input.device or vector.dtype not in _DTYPES:
            raise InputError(
                f"{where()}expected {name} to be floating and on {input.device}, as the input is, "
                f"got {vector.dtype} on {vector.device}"
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


def check_residual(input: Tensor, residual: Tensor | None) -> None:
    """Refuses a shortcut that cannot be added to the output.

    Raises:
        InputError: of a shape that does not broadcast to the input's, or on another device.
    """
    if residual is None:
        return
    fits = residual.dim() <= input.dim() and all(
        m in (1, n) for m, n in zip(reversed(residual.shape), reversed(input.shape), strict=False)
    )
    if not fits or residual.device != input.device:
        raise InputError(
            f"{where()}expected a residual that broadcasts to {shape(input)}, on {input.device}, "
            f"got {shape(residual)} on {residual.device}"
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
            raise known_everywhere(_one_value(local_count))
        return
    # A rank that holds two values knows the answer. Where the total is one no rank holds two, so all of them look.
    if not isinstance(local_count, Tensor) and local_count > 1:
        return
    refused = _one_value(local_count)
    try:
        torch._assert_async(counts.sum() != 1, str(refused))
    except RuntimeError as error:
        raise known_everywhere(refused) from error


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
