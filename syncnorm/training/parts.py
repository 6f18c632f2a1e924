"""Divides the arguments of a model into micro-batches, and concatenates its outputs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from syncnorm.errors import InputError

INSTEAD = "divide the batch yourself and call syncnorm.training.run_in_step"


class Part(NamedTuple):
    """One micro-batch of the arguments.

    Attributes:
        value: of the same structure as the whole.
        samples: how many it has.
    """

    value: Any
    samples: int


def divided(whole: Any, count: int) -> list[Part]:
    """``whole`` in ``count`` parts, whose sizes differ by one sample at most; fewer if there are fewer samples.

    Args:
        whole: tensors in tuples, lists and dicts, with samples in dimension 0; lists with one element per sample.
        count: 1 or more.

    Raises:
        InputError: there is no tensor, or one has another number of entries than the others.
    """
    samples = _samples(whole)
    if samples is None:
        raise InputError(f"the arguments of the model have no tensor or list that can be divided: {INSTEAD}")
    count = max(min(count, samples), 1)
    bounds = pairwise(samples * i // count for i in range(count + 1))
    return [Part(_slice(whole, samples, start, end), end - start) for start, end in bounds]


def concatenated(outputs: Sequence[Any], samples: Sequence[int]) -> Any:
    """The outputs of all parts as one.

    What all parts return as the same object, such as a parameter, is the output of the whole as well.

    Args:
        outputs: of one structure: tensors with the part's samples, or a multiple of them, in dimension 0.
        samples: of each part.

    Raises:
        InputError: they cannot be concatenated.
    """
    first = outputs[0]
    if len(outputs) > 1 and all(output is first for output in outputs):
        return first
    if any(type(output) is not type(first) for output in outputs):
        raise InputError(f"the outputs of the micro-batches differ in type: {INSTEAD}")
    if isinstance(first, Tensor):
        _check_rows(outputs, samples)
        return torch.cat(list(outputs)) if len(outputs) > 1 else first
    if isinstance(first, dict):
        if any(output.keys() != first.keys() for output in outputs):
            raise InputError(f"the outputs of the micro-batches have different keys: {INSTEAD}")
        merged = {key: concatenated([output[key] for output in outputs], samples) for key in first}
        return merged if type(first) is dict else type(first)(**merged)
    if isinstance(first, tuple | list):
        if any(len(output) != len(first) for output in outputs):
            raise InputError(f"the outputs of the micro-batches have different lengths: {INSTEAD}")
        columns = [concatenated(column, samples) for column in zip(*outputs, strict=True)]
        return type(first)(*columns) if hasattr(first, "_fields") else type(first)(columns)
    if all(_are_equal(output, first) for output in outputs):
        return first
    raise InputError(f"outputs of type {type(first).__name__} that differ cannot be concatenated: {INSTEAD}")


def _are_equal(a: Any, b: Any) -> bool:
    try:
        return a is b or bool(a == b)
    except (RuntimeError, ValueError):  # as of tensors and arrays in a dataclass
        return False


def _check_rows(outputs: Sequence[Tensor], samples: Sequence[int]) -> None:
    first = next((i for i, n in enumerate(samples) if n), 0)
    rows = [output.size(0) if output.dim() else None for output in outputs]
    per_sample = (rows[first] or 0) // max(samples[first], 1)
    if any(row != n * per_sample for row, n in zip(rows, samples, strict=True)) and len(outputs) > 0:
        shapes = [tuple(output.shape) for output in outputs]
        raise InputError(
            f"an output of the micro-batches, of {list(samples)} samples, has shapes {shapes}: expected dimension 0 "
            f"to be that of the samples, or a multiple. For a loss or another result of the whole batch, compute it "
            f"from the outputs, or {INSTEAD}"
        )


def _samples(value: Any) -> int | None:
    """The number of samples: of the first tensor in tuples and dicts, else the length of the first list.

    One entry is the number only if nothing has more.
    """
    found = [tensor.size(0) for tensor in _tensors(value) if tensor.dim()] or [len(v) for v in _lists(value)]
    return next((n for n in found if n != 1), found[0] if found else None)


def _tensors(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [found for v in _children(value) for found in _tensors(v)]


def _lists(value: Any) -> list[list[Any]]:
    return [value] if isinstance(value, list) else [found for v in _children(value) for found in _lists(v)]


def _children(value: Any) -> list[Any]:
    if isinstance(value, PackedSequence):
        raise InputError(f"a PackedSequence cannot be divided: {INSTEAD}")
    if isinstance(value, dict):
        return list(value.values())
    return list(value) if isinstance(value, tuple) else []


def _slice(value: Any, samples: int, start: int, end: int) -> Any:
    if isinstance(value, Tensor):
        if value.dim() == 0 or (value.size(0) == 1 and samples != 1):
            return value
        if value.size(0) != samples:
            raise InputError(
                f"expected {samples} samples in dimension 0 of every tensor, got one of shape {tuple(value.shape)}: "
                f"{INSTEAD}"
            )
        return value[start:end]
    if isinstance(value, dict):
        items = {key: _slice(child, samples, start, end) for key, child in value.items()}
        return items if type(value) is dict else type(value)(items)
    if isinstance(value, list) and len(value) == samples and not _all_have(value, samples):
        return value[start:end]
    if isinstance(value, tuple | list):
        parts = [_slice(child, samples, start, end) for child in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def _all_have(values: list[Any], samples: int) -> bool:
    """Whether a list as long as there are samples is one of tensors that each have all samples."""
    return all(isinstance(v, Tensor) and v.dim() > 0 and v.size(0) == samples for v in values)
