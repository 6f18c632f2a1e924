"""Finds calls of ``F.batch_norm`` in the bytecode of a module's forward, without running it."""

import dis
import functools
import inspect
import sys
from collections.abc import Iterator, Mapping
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from syncnorm.conversion.forward_override import SyncOverrideMixin
from syncnorm.modules import INSTEAD, Synced

# Instructions between the load of an object and the lookup of its attribute.
_NEUTRAL_INSTRUCTIONS = ("PUSH_NULL", "CACHE", "NOP", "EXTENDED_ARG", "COPY", "SWAP", "ROT_TWO", "POP_TOP")
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def mentions_batch_norm(cls: type) -> bool:
    """Whether the forward of ``cls``, or a function that it calls, contains the name ``batch_norm``.

    An attribute of any object counts. Use it for batch norm classes, whose forward is expected to call
    ``F.batch_norm``, possibly under another name.
    """
    for function in _reachable_functions(cls):
        names = set(_names(function.__code__))
        if "batch_norm" in names or any(_is_batch_norm(function.__globals__.get(name)) for name in names):
            return True
    return False


def calls_batch_norm(cls: type) -> bool:
    """Whether the forward of ``cls``, or a function that it calls, loads ``F.batch_norm`` or ``torch.batch_norm``.

    Use it for any module: a child module named ``batch_norm`` does not count.
    """
    return any(
        _loads_batch_norm(function.__code__, function.__globals__, _nonlocals(function))
        for function in _reachable_functions(cls)
    )


def bypassed_layers(model: nn.Module) -> dict[nn.Module, str]:
    """The synced layers whose parent module seems to bypass them by calling ``F.batch_norm``, each with a note.

    The calls are found in the code of the parent's class. A layer whose own forward has run in training is not
    bypassed, nor is one inside a layer whose forward is overridden.
    """
    overridden = {m for layer in model.modules() if isinstance(layer, SyncOverrideMixin) for m in layer.modules()}
    calls = functools.cache(calls_batch_norm)  # a model has many instances of a class
    bypassed: dict[nn.Module, str] = {}
    for module in model.modules():
        layers = [m for m in _children(module) if isinstance(m, Synced) and m._sync_seen is None]
        if layers and module not in overridden and calls(type(module)):  # type: ignore[arg-type]  # types are hashable
            note = f"{type(module).__name__}.forward calls F.batch_norm itself: {INSTEAD}"
            bypassed.update(dict.fromkeys(layers, note))
    return bypassed


def _children(module: nn.Module) -> Iterator[nn.Module]:
    """The children of ``module``, and those of its children that are containers."""
    for child in module.children():
        yield child
        if isinstance(child, _CONTAINERS):
            yield from _children(child)


def _reachable_functions(cls: type) -> Iterator[FunctionType]:
    """The forward of ``cls`` and the functions that it names, of its class, parents or Python module, each once."""
    pending: list[Any] = [cls.forward]  # type: ignore[attr-defined]  # a subclass of nn.Module
    seen: set[CodeType] = set()
    while pending:
        function = inspect.unwrap(pending.pop())
        if not isinstance(function, FunctionType) or function.__code__ in seen:
            continue
        seen.add(function.__code__)
        yield function
        for name in set(_names(function.__code__)):
            # every definition along the MRO, because super() names the method but not the class
            pending += [c.__dict__[name] for c in cls.__mro__ if c is not nn.Module and name in c.__dict__]
            helper = function.__globals__.get(name)
            if getattr(helper, "__module__", None) == function.__module__:
                pending.append(helper)


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _is_batch_norm(value: Any) -> bool:
    if isinstance(value, functools.partial):
        value = value.func
    return value is F.batch_norm or value is torch.batch_norm


def _loads_batch_norm(code: CodeType, global_names: Mapping[str, Any], nonlocals: Mapping[str, Any]) -> bool:
    """Follows the loads of ``code`` instruction by instruction: first of a name, then of its attributes.

    Args:
        code: of a function.
        global_names: of the Python module that defines the function.
        nonlocals: names of the functions that enclose it.
    """
    local_names = dict(nonlocals)
    value: Any = None  # the object that was loaded last, if it is known
    for instruction in dis.get_instructions(code):
        operation, name = instruction.opname, instruction.argval
        if operation in ("LOAD_GLOBAL", "LOAD_NAME"):
            value = global_names.get(name)
        elif operation.startswith(("LOAD_FAST", "LOAD_DEREF")):
            value = local_names.get(name)
        elif operation in ("LOAD_ATTR", "LOAD_METHOD"):
            value = _module_attribute(value, name)
        elif operation == "IMPORT_NAME":
            value = sys.modules.get(name)
        elif operation == "IMPORT_FROM":  # also part of `import a.b as c`, which imports a first
            value = _module_attribute(value, name) or value
        elif operation.startswith(("STORE_FAST", "STORE_DEREF")):
            local_names[name], value = value, None
        elif operation not in _NEUTRAL_INSTRUCTIONS:
            value = None
        if _is_batch_norm(value):
            return True
    nested = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return any(_loads_batch_norm(inner, global_names, local_names) for inner in nested)


def _module_attribute(value: Any, name: str) -> Any:
    """An attribute of a Python module; None for any other object, whose attributes may be computed."""
    return vars(value).get(name) if isinstance(value, ModuleType) else None


def _nonlocals(function: FunctionType) -> dict[str, Any]:
    try:
        return dict(inspect.getclosurevars(function).nonlocals)
    except ValueError:  # a name that has no value yet
        return {}
