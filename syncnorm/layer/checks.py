"""The checks of a layer's arguments. Errors say what was got, what was expected, and on which rank."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from syncnorm._torch_versions import is_initialized
from syncnorm.errors import InputError, known_everywhere
from syncnorm.layer.moments import Count, Running

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensor(input: object) -> None:
    """Rejects what is not a tensor.

    Raises:
        InputError: with the class of ``input``.
    """
    if not isinstance(input, Tensor):
        raise InputError(f"{where()}expected a tensor, got {type(input).__name__}")


def check_input(input: Tensor, channels: int | None = None) -> None:
    """Rejects an input that cannot be normalized.

    Args:
        input: should be (batch, C, *spatial), floating.
        channels: the expected C; None for any.

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
    """Rejects parameters and buffers without one floating value per channel on the device of ``input``.

    Raises:
        InputError: with the name of the first such vector.
    """
    shape_C, device = input.shape[1:2], input.device
    for name, vector in vectors.items():
        if vector is None or (vector.shape == shape_C and vector.dtype in _DTYPES and vector.device == device):
            continue
        if vector.shape != shape_C:
            raise InputError(
                f"{where()}expected {name} to have one value for each of {input.size(1)} channels "
                f"(input of {shape(input)}), got {shape(vector)}"
            )
        raise InputError(
            f"{where()}expected {name} to be floating and on {input.device}, as the input is, "
            f"got {vector.dtype} on {vector.device}"
        )


def check_mask(input: Tensor, mask: Tensor | None) -> None:
    """Rejects a mask of a wrong dtype or shape.

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
            f"{where()}expected a boolean mask that broadcasts to (batch, *spatial) = {_sizes(expected)}, "
            f"got {mask.dtype} of {shape(mask)}"
        )


def check_residual(input: Tensor, residual: Tensor | None) -> None:
    """Rejects a shortcut that cannot be added to the output.

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


def check_training(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running: Running | None,
    eps: float,
    synced: bool,
    masked: bool,
) -> None:
    """Rejects what could be exchanged with other ranks but not be normalized or differentiated after that.

    Args:
        input: passed :func:`check_input`.
        weight: passed :func:`check_vectors`, like ``bias`` and ``running``.
        bias: as ``weight``.
        running: as ``weight``.
        eps: of the layer.
        synced: whether other ranks share the statistics.
        masked: whether there is a mask.

    Raises:
        InputError: the input is not a dense tensor with data; a tensor that autograd needs, or that is updated, was
            made in inference mode; eps is not positive; a cumulative average without its count.
    """
    if synced:
        _check_dense(input)
        if not (torch.compiler.is_compiling() or torch.is_inference_mode_enabled()):
            _check_no_inference_tensors(input, weight, bias, running)
    if running is not None and running.momentum is None and running.num_batches_tracked is None:
        raise InputError("momentum=None averages over num_batches_tracked, which was not given")
    if eps <= 0 and (synced or masked):
        raise InputError(f"eps must be positive in training, got {eps}")


def _check_dense(input: Tensor) -> None:
    if input.is_nested or input.layout != torch.strided:
        kind = "nested tensor" if input.is_nested else f"layout {input.layout}"
        raise InputError(f"{where()}expected a dense tensor, got a {kind}; convert it first")
    if input.is_meta:
        raise InputError(f"{where()}expected an input with data, got one on the meta device")


def _check_no_inference_tensors(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, running: Running | None
) -> None:
    differentiated = ("input", input), ("weight", weight), ("bias", bias)
    updated = () if running is None else (("running_mean", running.mean), ("running_var", running.var))
    for name, tensor in (*updated, *differentiated):
        if tensor is None or not tensor.is_inference():
            continue
        needs_grad = torch.is_grad_enabled() and any(v is not None and v.requires_grad for _, v in differentiated)
        if needs_grad or name.startswith("running"):
            raise InputError(
                f"{where()}expected {name} to be an ordinary tensor, got one that was made in torch.inference_mode, "
                f"which autograd cannot use; clone it outside of that mode"
            )


def check_count(counts: Sequence[int] | Tensor, local_count: Count) -> None:
    """Rejects a global batch of one value per channel, on all ranks.

    It is no error if all ranks are empty: there is nothing to normalize.

    Args:
        counts: of all ranks; a tensor if only the device knows them.
        local_count: the one of this rank.

    Raises:
        InputError: the global batch has one value per channel. On a GPU the device checks it, and the host does not
            wait: if the assertion fails there, this process can no longer use CUDA.
    """
    if not isinstance(counts, Tensor):
        if sum(counts) == 1:
            raise known_everywhere(_one_value(local_count))
        return
    # A rank with two values knows that the total is not one. If it is one, no rank has two, so all of them check.
    if not isinstance(local_count, Tensor) and local_count > 1:
        return
    error = _one_value(local_count)
    try:
        torch._assert_async(counts.sum() != 1, str(error))
    except RuntimeError as raised:
        raise known_everywhere(error) from raised


def _one_value(local_count: Count) -> InputError:
    here = "" if isinstance(local_count, Tensor) else f" ({local_count} of them on this rank)"
    return InputError(f"{where()}expected more than 1 value per channel over all ranks in training, got 1{here}")


def where() -> str:
    """``"rank 3: "``, the head of a message; empty outside of distributed runs."""
    if is_initialized():
        return f"rank {dist.get_rank()}: "
    return ""


def shape(tensor: Tensor) -> str:
    """The shape, for a message."""
    return f"shape {_sizes(tensor.shape)}"


def _sizes(sizes: Sequence[int]) -> str:
    """As a tuple is printed; the tracer of ``torch.compile`` cannot print one of symbolic sizes."""
    text = ""
    for index, size in enumerate(sizes):
        text = f"{text}, {size}" if index else f"{size}"
    return f"({text},)" if len(sizes) == 1 else f"({text})"
