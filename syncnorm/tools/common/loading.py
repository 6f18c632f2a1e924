"""Finds the function that a command line names as ``package.module:function``."""

from __future__ import annotations

import importlib
import os
import sys
from difflib import get_close_matches
from pkgutil import iter_modules
from types import ModuleType
from typing import Any

from syncnorm.errors import InputError
from syncnorm.tools.common.errors import one_line


def load(name: str, option: str, also: type | None = None) -> Any:
    """The function called ``name``. The current directory is searched first, as by ``python -m``.

    Args:
        name: ``package.module:function``; the part after the colon may contain dots, for methods of classes.
        option: the command-line option that the name was given to, for messages: ``--model``.
        also: a type whose instances are found as well.

    Raises:
        InputError: there is no such module or attribute, the import fails, or the object is not callable.
    """
    module_name, colon, path = name.partition(":")
    if not colon or not path or not all(part.isidentifier() for part in module_name.split(".")):
        raise InputError(f"{option} {name!r}: expected package.module:function, for example {option} nets:build")
    search_current_directory()
    found: Any = _module(module_name, f"{option} {name}")
    for part in path.split("."):
        if not hasattr(found, part):
            raise InputError(f"{option} {name}: {module_name} has no {part!r}{similar(part, _public(found))}")
        found = getattr(found, part)
    if not callable(found) and not (also and isinstance(found, also)):
        kind = type(found).__name__
        article = "an" if kind[0] in "aeiouAEIOU" else "a"
        raise InputError(f"{option} {name}: expected a function, got {article} {kind}: write one that returns it")
    return found


def search_current_directory() -> None:
    """Lets modules in the current directory be imported."""
    # The script that pip installs has its own folder on sys.path, and not the current directory.
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())


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
            f"{where}: no module named {missing}{similar(last, siblings)} (searched {os.getcwd()} and sys.path)"
        ) from error
    except Exception as error:  # the module is the user's own code
        raise InputError(f"{where}: importing {name} raised {one_line(error)}") from error


def similar(name: str, known: list[str]) -> str:
    """``": did you mean x?"``, or nothing."""
    similar = get_close_matches(name, known, n=3, cutoff=0.5)
    return f": did you mean {' or '.join(similar)}?" if similar else ""


def _public(owner: Any) -> list[str]:
    """Names that a user may have meant, without those of modules that ``owner`` imports."""
    known = vars(owner).items() if hasattr(owner, "__dict__") else ()
    return [name for name, value in known if not name.startswith("_") and not isinstance(value, ModuleType)]
