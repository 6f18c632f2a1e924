"""What the forward of a class calls, read from its code alone: nothing is run."""

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

# Instructions that leave what was loaded last where an attribute is then looked up.
_KEEPING = ("PUSH_NULL", "CACHE", "NOP", "EXTENDED_ARG", "COPY", "SWAP", "ROT_TWO", "POP_TOP")
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def names_batch_norm(cls: type) -> bool:
    """Whether the forward of ``cls``, or what it calls, names ``batch_norm``, be it as an attribute of anything.

    Right for a batch norm, of whose forward a call of ``F.batch_norm`` is expected, under whatever name.
    """
    for function in _functions(cls):
        names = set(_names(function.__code__))
        if "batch_norm" in names or any(_is_batch_norm(function.__globals__.get(name)) for name in names):
            return True
    return False


def loads_batch_norm(cls: type) -> bool:
    """Whether the forward of ``cls``, or what it calls, loads ``F.batch_norm`` or ``torch.batch_norm``.

    For any module: a child that is called ``batch_norm`` does not count.
    """
    return any(
        _loads_batch_norm(function.__code__, function.__globals__, _closure(function)) for function in _functions(cls)
    )


def near_children(module: nn.Module) -> Iterator[nn.Module]:
    """The children of ``module``, and what lies in those that are lists, dicts and sequences of modules."""
    for child in module.children():
        yield child
        if isinstance(child, _CONTAINERS):
            yield from near_children(child)


def _functions(cls: type) -> Iterator[FunctionType]:
    """The forward of ``cls`` and what it calls by name in its class, parents or module, each once."""
    pending: list[Any] = [cls.forward]  # type: ignore[attr-defined]
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


def _loads_batch_norm(code: CodeType, module: Mapping[str, Any], around: Mapping[str, Any]) -> bool:
    """Follows the loads of ``code``, instruction by instruction: names of its ``module``, then their attributes.

    Args:
        code: of a function.
        module: its global names.
        around: names of the functions that it is nested in.
    """
    local = dict(around)
    value: Any = None  # what was loaded last, where that is known
    for instruction in dis.get_instructions(code):
        operation, name = instruction.opname, instruction.argval
        if operation in ("LOAD_GLOBAL", "LOAD_NAME"):
            value = module.get(name)
        elif operation.startswith(("LOAD_FAST", "LOAD_DEREF")):
            value = local.get(name)
        elif operation in ("LOAD_ATTR", "LOAD_METHOD"):
            value = _attribute(value, name)
        elif operation == "IMPORT_NAME":
            value = sys.modules.get(name)
        elif operation == "IMPORT_FROM":  # of `import a.b as c`, too, which comes by way of a
            value = _attribute(value, name) or value
        elif operation.startswith(("STORE_FAST", "STORE_DEREF")):
            local[name], value = value, None
        elif operation not in _KEEPING:
            value = None
        if _is_batch_norm(value):
            return True
    nested = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return any(_loads_batch_norm(inner, module, local) for inner in nested)


def _attribute(value: Any, name: str) -> Any:
    """An attribute of a module; of nothing else, whose attributes may be computed."""
    return vars(value).get(name) if isinstance(value, ModuleType) else None


def _closure(function: FunctionType) -> dict[str, Any]:
    try:
        return dict(inspect.getclosurevars(function).nonlocals)
    except ValueError:  # a name that has no value yet
        return {}
