"""Traces the forward of a block as a ``torch.fx`` graph, and rejects a forward that does more than the graph shows.

A tracer runs the forward once with proxies for tensors, and records the calls that involve them. The graph omits
everything else that the forward does: testing whether an argument is None, disabling autograd or autocast around some
calls, drawing random numbers, storing something on the module. torch.fx drops each of these silently; here it is an
error.
"""

import inspect
import operator
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from syncnorm._torch_versions import top_saved_tensors_hooks

_AUTOCAST_DEVICES = ("cpu", "cuda")


class NotTraceable(Exception):
    """What a graph of the block would omit."""


def trace_block(block: nn.Module) -> fx.Graph:
    """The graph of ``block``'s forward with its children as leaves; ``block`` stays unchanged.

    Raises:
        NotTraceable: the graph would not do everything that the forward does.
    """
    if "forward" in block.__dict__:
        raise NotTraceable("its forward was replaced on the instance")
    _, *arguments = inspect.signature(type(block).forward).parameters.values()
    if len(arguments) != 1 or arguments[0].default is None:
        raise NotTraceable("its forward has an argument that may be None or omitted")
    graphs = []
    try:
        for training in (True, False):
            with _side_effects_rejected(block), _grad_or_autocast(training):
                block.training = training
                graphs.append(_Tracer().trace(block))
    except NotTraceable:
        raise
    except Exception as error:  # code that a tracer cannot follow can fail with any exception
        raise NotTraceable(f"torch.fx cannot trace its forward: {error}") from error
    if str(graphs[0]) != str(graphs[1]):
        raise NotTraceable("its forward differs between training and evaluation")
    if any(node.op == "get_attr" and "_tensor_constant" in str(node.target) for node in graphs[0].nodes):
        raise NotTraceable("its forward creates tensors")
    return graphs[0]


class _Proxy(fx.Proxy):
    """A proxy that records ``x += y`` as an in-place operation, where torch's own records ``x = x + y``.

    It rejects ``isinstance(x, Tensor)``, because the graph would keep the branch that was taken for a proxy.
    """

    @property  # type: ignore[misc]  # object's attribute is writable
    def __class__(self) -> type:
        if not sys._getframe(1).f_globals.get("__name__", "").startswith("torch."):
            raise NotTraceable("its forward tests the type of its input")
        return _Proxy


def _in_place_operator(function: Callable[..., Any]) -> Callable[..., Any]:
    def in_place(self: fx.Proxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return in_place


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor"):
    setattr(_Proxy, f"__{_name}__", _in_place_operator(getattr(operator, _name)))


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True  # otherwise tracing would execute in-place operations on buffers

    def __init__(self) -> None:
        super().__init__()
        self._mode = _execution_mode()

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _execution_mode() != self._mode:
            raise NotTraceable("its forward changes the autograd or autocast mode, or checkpoints a part of itself")
        return super().create_node(*args, **kwargs)


def _execution_mode() -> tuple[Any, ...]:
    """State that a context manager in the forward may change and that a graph does not record."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        [(torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in _AUTOCAST_DEVICES],
        top_saved_tensors_hooks() is None,
    )


@contextmanager
def _grad_or_autocast(grad: bool) -> Iterator[None]:
    """Enables autograd and disables autocast, or the reverse, so that a forward that sets one of them changes it."""
    before = [torch.is_autocast_enabled(d) for d in _AUTOCAST_DEVICES]
    try:
        for device in _AUTOCAST_DEVICES:
            torch.set_autocast_enabled(device, not grad)
        with torch.set_grad_enabled(grad):
            yield
    finally:
        for device, enabled in zip(_AUTOCAST_DEVICES, before, strict=True):
            torch.set_autocast_enabled(device, enabled)


@contextmanager
def _side_effects_rejected(block: nn.Module) -> Iterator[None]:
    """Restores attributes and random generators, then raises NotTraceable if the forward changed one of them."""
    attributes = {module: dict(module.__dict__) for module in block.modules()}
    contents = [
        (value, value.copy()) for each in attributes.values() for value in each.values() if _is_container(value)
    ]
    numpy = sys.modules.get("numpy")
    states: tuple[Any, ...] = (
        torch.default_generator.get_state(),
        random.getstate(),
        numpy.random.get_state() if numpy else None,
    )
    try:
        yield
    finally:
        drawn = not (
            torch.equal(states[0], torch.default_generator.get_state())
            and states[1] == random.getstate()
            and (not numpy or repr(states[2][2:]) == repr(numpy.random.get_state()[2:]))
        )
        torch.default_generator.set_state(states[0])
        random.setstate(states[1])
        if numpy:
            numpy.random.set_state(states[2])
        stored = False
        block.training = attributes[block]["training"]
        for module, old in attributes.items():
            if not _same_objects(old, module.__dict__):
                stored = True
                module.__dict__.clear()
                module.__dict__.update(old)
        for value, old in contents:
            if not _same_objects(value, old):
                stored = True
                value.clear()
                value.extend(old) if isinstance(value, list) else value.update(old)
    if drawn:
        raise NotTraceable("its forward draws random numbers")
    if stored:
        raise NotTraceable("its forward stores something on the module")


def _is_container(value: Any) -> bool:
    return type(value) in (list, dict, set)


def _same_objects(a: Any, b: Any) -> bool:
    """Whether two containers hold the same objects."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(a[key] is b[key] for key in a)
    return [id(each) for each in a] == [id(each) for each in b] if isinstance(a, list) else bool(a == b)
