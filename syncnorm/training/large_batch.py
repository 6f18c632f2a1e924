"""A large batch as micro-batches that run in step: batch norm sees the whole of it, and memory holds a part."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from syncnorm.errors import InputError
from syncnorm.layer import in_step
from syncnorm.modules import Synced
from syncnorm.training.offload import OffloadedTensors
from syncnorm.training.parts import concatenated, divided

P = TypeVar("P")
T = TypeVar("T")


@contextmanager
def whole_batch(model: nn.Module, micro_batches: int, *, offload: bool = True) -> Iterator[None]:
    """A context in which ``model`` computes its batch in parts, and its synced layers see all of it.

    Gradient accumulation with plain batch norm normalizes each micro-batch by its own statistics. Here the
    micro-batches run in step, layer by layer, as ranks do. Outputs, gradients and running statistics are those of
    the whole batch up to rounding, and running statistics are updated once. One ``backward`` follows, of a loss of
    the whole output; inside of the context or after it. There is no second derivative, as for a gradient penalty.
    Dropout draws other numbers than for an undivided batch, and other state that a forward changes, such as that of
    ``spectral_norm``, is changed by each part.

    In memory are, at the largest, what one micro-batch computes between two synced layers, and what all of them keep
    from one layer to the next. Activations for the backward are in host memory (``offload``), or checkpointed in the
    model by ``torch.utils.checkpoint`` with ``use_reentrant=False``; otherwise they take the memory of the whole
    batch.

    Args:
        model: after :func:`syncnorm.convert`; plain or in ``DistributedDataParallel``. Compiled parts run in eager
            mode. Every call in the context is divided.
        micro_batches: the number of parts, which have the same size or differ by one sample. It may differ by rank.
            A batch of fewer samples has as many parts as samples.
        offload: keep what the backward needs in host memory, unless it is there already.

    Arguments of the model: all tensors of one or more dimensions must have one entry per sample in dimension 0, or
    one entry in all; they may stand in tuples, lists and dicts. A list with one element per sample is divided as a
    list. Everything else is passed to every part. Outputs: tensors whose dimension 0 is that of the samples, or a
    multiple of it, in tuples, lists and dicts; they are concatenated. An object that all parts return, and equal
    values of other types, are returned as they are. For others use :func:`run_in_step`.

    Raises:
        InputError: the options are wrong; a batch norm of the model is in training mode and not synced, or in eval
            mode without running statistics; the model is sharded by FSDP; in a forward, the arguments or outputs
            cannot be divided.
        SyncNormError: in a forward, the micro-batches call different layers. In a backward: see :func:`run_in_step`.

    Collective: as one forward and one backward of the model, whatever the number of micro-batches.

    Example:
        >>> from syncnorm import convert
        >>> model = convert(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)))
        >>> with whole_batch(model, micro_batches=3):
        ...     output = model(torch.randn(12, 4))
        >>> output.square().mean().backward()
    """
    _check_number(micro_batches)
    module = _unwrapped(model)
    _check_model(module)
    own = module.__dict__.get("forward")
    module.forward = _ForwardInParts(module, micro_batches, offload)
    try:
        with _eager():
            yield
    finally:
        if own is None:
            del module.__dict__["forward"]
        else:
            module.forward = own


class _ForwardInParts:
    """The forward of a module in the context. Copies and pickles of the module, such as averages, are not divided."""

    def __init__(self, module: nn.Module, micro_batches: int, offload: bool):
        self._module, self._own, self._forward = module, module.__dict__.get("forward"), module.forward
        self._micro_batches, self._offload = micro_batches, offload

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        parts = divided((args, kwargs), self._micro_batches)
        if len(parts) > 1:
            in_step.check_surroundings()  # here already: under torch.func parameters have no storage
        kept = _kept(self._offload, self._module)
        outputs = _run(lambda part: self._forward(*part.value[0], **part.value[1]), parts, kept)
        return concatenated(outputs, [part.samples for part in parts])

    def __reduce__(self) -> tuple[Any, ...]:
        return _forward_of, (self._module, self._own)


def _forward_of(module: nn.Module, own: Callable[..., Any] | None) -> Callable[..., Any]:
    return MethodType(type(module).forward, module) if own is None else own


def run_in_step(
    function: Callable[[P], T], micro_batches: Sequence[P], *, offload: bool = True, model: nn.Module | None = None
) -> list[T]:
    """``[function(m) for m in micro_batches]``, where synced layers see all micro-batches as one batch.

    For what :func:`whole_batch` cannot divide or concatenate: inputs of other kinds, or losses that the model
    computes. Every call runs in a thread of its own, one at a time.

    Args:
        function: runs the model on a micro-batch.
        micro_batches: of any sizes, of any kind; their number may differ by rank.
        offload: keep what the backward needs in host memory, unless it is there already.
        model: whose parameters and buffers are not offloaded, if given.

    Returns:
        What the function returned for each.

    Raises:
        InputError: there are no micro-batches, or this is a call in one of them.
        SyncNormError: the micro-batches call different layers. In the backward: the loss depends on some of the
            outputs only, or ``torch.utils.checkpoint`` runs with ``use_reentrant=True``.

    Collective: as one forward of the model, and one backward.

    Example:
        >>> from syncnorm import convert
        >>> model = convert(nn.BatchNorm1d(4))
        >>> losses = run_in_step(lambda x: model(x).square().sum(), [torch.randn(3, 4), torch.randn(5, 4)])
        >>> (sum(losses) / 8).backward()
    """
    if len(micro_batches) == 0:
        raise InputError("run_in_step expects at least one micro-batch, got none")
    return _run(function, micro_batches, _kept(offload, model))


def _run(function: Callable[[P], T], micro_batches: Sequence[P], kept: OffloadedTensors | None) -> list[T]:
    def run_one(micro_batch: P) -> T:
        with nullcontext() if kept is None else kept.hooks():
            return function(micro_batch)

    if len(micro_batches) == 1:  # a batch like any other
        return [run_one(micro_batches[0])]
    try:
        with _eager():
            return in_step.run([partial(run_one, micro_batch) for micro_batch in micro_batches])
    finally:
        if kept is not None:
            kept.forget()


def _kept(offload: bool, model: nn.Module | None) -> OffloadedTensors | None:
    if not offload:
        return None
    return OffloadedTensors(() if model is None else [*model.parameters(), *model.buffers()])


def _eager() -> AbstractContextManager[Any]:
    """Compiled code runs in eager mode: its layers could not wait for each other."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and it takes seconds to import
        return nullcontext()
    eager: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return eager


def _check_number(micro_batches: Any) -> None:
    if not isinstance(micro_batches, int) or isinstance(micro_batches, bool) or micro_batches < 1:
        raise InputError(f"micro_batches={micro_batches!r} must be a positive integer")


def _unwrapped(model: nn.Module) -> nn.Module:
    """The module that computes: that of DDP, and that of ``torch.compile``."""
    if not isinstance(model, nn.Module):
        raise InputError(f"whole_batch expects an nn.Module, got {type(model).__name__}")
    wrapped = getattr(model, "module" if isinstance(model, DistributedDataParallel) else "_orig_mod", None)
    return model if wrapped is None else _unwrapped(wrapped)


def _check_model(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if any(cls.__module__.startswith("torch.distributed.fsdp") for cls in type(module).__mro__):
            raise InputError(
                f"{name or 'the model'} is sharded by FSDP, which gathers and frees the parameters of a module "
                f"around each forward, where micro-batches in step are at the same time. Use DDP, or "
                f"syncnorm.convert(model, accumulate=K)"
            )
    local = [
        name or "the model"
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm)
        and not (isinstance(module, Synced) if module.training else _is_frozen(module))
    ]
    if local:
        raise InputError(
            f"{', '.join(local[:3])}{' and others' if len(local) > 3 else ''} would see each micro-batch alone: "
            f"call syncnorm.convert(model) first, or eval() for batch norms that are frozen, which need running "
            f"statistics"
        )


def _is_frozen(norm: _BatchNorm) -> bool:
    """Whether a batch norm in eval mode uses running statistics; without them it uses those of its input."""
    return norm.running_mean is not None
