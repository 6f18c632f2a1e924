"""Functions by the name that a command line gives them: ``package.module:function``."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from difflib import get_close_matches
from pkgutil import iter_modules
from types import ModuleType
from typing import Any

from syncnorm.errors import InputError


def load(name: str, option: str) -> Callable[..., Any]:
    """The function called ``name``, looked for in the current directory first, as ``python -m`` does.

    Args:
        name: ``package.module:function``; dots behind the colon reach into classes.
        option: what the user gave it to, for messages: ``--model``.

    Raises:
        InputError: no such module or attribute, one that fails while it is imported, or nothing to call.
    """
    module_name, colon, path = name.partition(":")
    if not colon or not path or not all(part.isidentifier() for part in module_name.split(".")):
        raise InputError(f"{option} {name!r}: expected package.module:function, for example {option} nets:build")
    # A script of pip's has its own folder there, and no current one.
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    found: Any = _module(module_name, f"{option} {name}")
    for part in path.split("."):
        if not hasattr(found, part):
            raise InputError(f"{option} {name}: {module_name} has no {part!r}{_near(part, _public(found))}")
        found = getattr(found, part)
    if not callable(found):
        raise InputError(f"{option} {name}: expected a function, got {_a(found)}: write one that returns it")
    return found  # type: ignore[no-any-return]


def _module(name: str, where: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if name != missing and not name.startswith(f"{missing}."):
            raise InputError(f"{where}: {name} needs the module {missing}, which is not installed") from error
        package, _, last = missing.rpartition(".")
        search = getattr(sys.modules.get(package), "__path__", None) if package else [os.getcwd()]
        siblings = [each.name for each in iter_modules(search)] if search is not None else []
        raise InputError(
            f"{where}: no module named {missing}{_near(last, siblings)} (looked in {os.getcwd()} and on the "
            f"path of Python)"
        ) from error
    except Exception as error:  # the user's own code runs here
        raise InputError(f"{where}: importing {name} raised {told(error)}") from error


def told(error: BaseException) -> str:
    """An exception in one line; where it was raised from, as far as that is another's code."""
    text = " ".join(str(error).split())
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    at = f" ({trace.tb_frame.f_code.co_filename}:{trace.tb_lineno})" if trace else ""
    return f"{type(error).__name__}: {text}{at}" if text else f"{type(error).__name__}{at}"


def _near(name: str, known: list[str]) -> str:
    near = get_close_matches(name, known, n=3, cutoff=0.5)
    return f": did you mean {' or '.join(near)}?" if near else ""


def _public(owner: Any) -> list[str]:
    """What a user may have meant: modules that it imports are not."""
    known = vars(owner).items() if hasattr(owner, "__dict__") else ()
    return [name for name, value in known if not name.startswith("_") and not isinstance(value, ModuleType)]


def _a(value: Any) -> str:
    kind = type(value).__name__
    return f"{'an' if kind[0] in 'aeiouAEIOU' else 'a'} {kind}"
