"""The calls that a block's forward makes, as a ``torch.fx`` graph; or why no graph tells all that it does.

A tracer runs the forward once, with stand-ins for tensors, and notes what is called on them. What the forward does
besides is not in the graph: it asks whether an argument is None, turns autograd or autocast off around some calls,
draws random numbers, keeps something on the module. Each of these would be lost, with no error, and is refused here.
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

_AUTOCAST_DEVICES = ("cpu", "cuda")


class NotTraceable(Exception):
    """Says what a graph of the block would leave out."""


def graph_of(block: nn.Module) -> fx.Graph:
    """The graph of ``block``'s forward, with its children as leaves; ``block`` is as it was.

    Raises:
        NotTraceable: the graph would not do all that the forward does.
    """
    if "forward" in block.__dict__:
        raise NotTraceable("its forward was replaced on the instance")
    _, *arguments = inspect.signature(type(block).forward).parameters.values()
    if len(arguments) != 1 or arguments[0].default is None:
        raise NotTraceable("its forward has an argument that may be None, or left out")
    graphs = []
    try:
        for training in (True, False):
            with _watched(block), _modes(training):
                block.training = training
                graphs.append(_Tracer().trace(block))
    except NotTraceable:
        raise
    except Exception as error:  # what a tracer cannot follow shows as any error of the block's own code
        raise NotTraceable(f"torch.fx cannot trace its forward: {error}") from error
    if str(graphs[0]) != str(graphs[1]):
        raise NotTraceable("its forward is another one in training")
    if any(node.op == "get_attr" and "_tensor_constant" in str(node.target) for node in graphs[0].nodes):
        raise NotTraceable("its forward makes tensors of its own")
    return graphs[0]


class _Proxy(fx.Proxy):
    """A proxy that knows ``x += y``, which to torch's own is ``x = x + y``, and leaves what x was as it is.

    It does not answer ``isinstance(x, Tensor)``, of which the graph would keep the answer for a proxy.
    """

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        if not sys._getframe(1).f_globals.get("__name__", "").startswith("torch."):
            raise NotTraceable("its forward asks what its input is")
        return _Proxy


def _recorded(function: Callable[..., Any]) -> Callable[..., Any]:
    def in_place(self: fx.Proxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return in_place


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor"):
    setattr(_Proxy, f"__{_name}__", _recorded(getattr(operator, _name)))


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True  # else what the forward writes to a buffer is written while it is traced

    def __init__(self) -> None:
        super().__init__()
        self._mode = _mode()

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _mode() != self._mode:
            raise NotTraceable("its forward changes autograd's or autocast's mode, or checkpoints a part of itself")
        return super().create_node(*args, **kwargs)


def _mode() -> tuple[Any, ...]:
    """What a context manager may have set, and a graph does not hold."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        [(torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in _AUTOCAST_DEVICES],
        torch._C._autograd._top_saved_tensors_default_hooks(False) is None,
    )


@contextmanager
def _modes(on: bool) -> Iterator[None]:
    """Autograd on and autocast off, or the other way about: a forward that sets either differs from one of them."""
    before = [torch.is_autocast_enabled(d) for d in _AUTOCAST_DEVICES]
    try:
        for device in _AUTOCAST_DEVICES:
            torch.set_autocast_enabled(device, not on)
        with torch.set_grad_enabled(on):
            yield
    finally:
        for device, enabled in zip(_AUTOCAST_DEVICES, before, strict=True):
            torch.set_autocast_enabled(device, enabled)


@contextmanager
def _watched(block: nn.Module) -> Iterator[None]:
    """Puts attributes and random generators back as they were, and refuses a forward that changed one."""
    attributes = {module: dict(module.__dict__) for module in block.modules()}
    contents = [(value, value.copy()) for each in attributes.values() for value in each.values() if _holds(value)]
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
        kept = False
        block.training = attributes[block]["training"]
        for module, old in attributes.items():
            if not _alike(old, module.__dict__):
                kept = True
                module.__dict__.clear()
                module.__dict__.update(old)
        for value, old in contents:
            if not _alike(value, old):
                kept = True
                value.clear()
                value.extend(old) if isinstance(value, list) else value.update(old)
    if drawn:
        raise NotTraceable("its forward draws random numbers of its own")
    if kept:
        raise NotTraceable("its forward keeps something on the module")


def _holds(value: Any) -> bool:
    return type(value) in (list, dict, set)


def _alike(a: Any, b: Any) -> bool:
    """Whether two containers hold the same objects."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(a[key] is b[key] for key in a)
    return [id(each) for each in a] == [id(each) for each in b] if isinstance(a, list) else bool(a == b)
