"""The messages between the caller and its ranks: pickles, and the modules that are needed to load them.

The pickles are ordinary ones, without torch's multiprocessing reductions. These pass CPU tensors as file descriptors
of shared memory, which run out, and which are closed when the rank that made them ends.
"""

import importlib
import importlib.util
import io
import pickle
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from syncnorm.errors import InputError

__tracebackhide__ = True  # pytest shows the line of a user's test instead of this file's

# Messages that are not pickles. None can be mistaken for one, because a pickle starts with b"\x80".
STOP = b"stop"  # to a rank: exit
LEAVE = b"leave"  # to a rank: all ranks have reported, close the process group
IDLE = b"idle"  # from a rank: the process group is closed, ready for the next call


@dataclass(frozen=True)
class RankCall:
    """One call on one rank, and the state of the caller's process that the rank takes over.

    Attributes:
        store: Path of the file for the rendezvous.
        timeout: In seconds.
        modules: Name -> file of the modules that ``pickled`` names.
        pickled: The function and its arguments.
    """

    rank: int
    world_size: int
    store: str
    timeout: float
    environ: dict[str, str]
    sys_path: list[str]
    cwd: str
    modules: dict[str, str]
    pickled: bytes


@dataclass(frozen=True)
class Returned:
    """The function returned; ``result`` is the pickle of what it returned."""

    result: bytes


@dataclass(frozen=True)
class Raised:
    """The function raised, at time ``at`` of the monotonic clock, which all processes of a machine share."""

    summary: str
    traceback: str
    exception: bytes | None
    at: float


class _ModuleCollectingPickler(pickle.Pickler):
    """Collects the module of every function and class that the pickle names."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.modules: dict[str, str] = {}

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, FunctionType | type):
            file = getattr(sys.modules.get(obj.__module__), "__file__", None)
            if file is not None:
                self.modules[obj.__module__] = str(Path(file).resolve())
            if (obstacle := _import_obstacle(obj, file)) is not None:
                raise InputError(
                    f"the ranks are other processes, which must be able to import {_place(obj)}, but {obstacle}"
                )
        return NotImplemented


def _import_obstacle(obj: FunctionType | type, file: str | None) -> str | None:
    """Why another process cannot import ``obj`` of a module in ``file``, and what to do; None if it can."""
    move = "move it to the top level of a module and pass what it needs as arguments"
    if "<lambda>" in obj.__qualname__:
        return f"it is a lambda: make it a function with a name, {move}"
    if "<locals>" in obj.__qualname__:
        return f"it is defined inside another function: {move}"
    if obj.__module__ == "__main__" and (file is None or not Path(file).exists()):
        return (
            "it is defined in an interactive session, in a notebook, on standard input or on the command line: put "
            "it in a file and import it from there"
        )
    return None


def _place(obj: FunctionType | type) -> str:
    code = getattr(obj, "__code__", None)
    return obj.__qualname__ if code is None else f"{obj.__qualname__} ({code.co_filename}:{code.co_firstlineno})"


def pickle_call(fn: Callable[..., object], args: tuple[Any, ...]) -> tuple[dict[str, str], bytes]:
    """Pickle ``(fn, args)``; return the modules that it names (name -> file) and the pickle.

    Raises:
        InputError: ``fn`` or one of ``args`` does not pickle, or is defined where no other process can import it.
    """
    name = getattr(fn, "__qualname__", repr(fn))
    buffer = io.BytesIO()
    pickler = _ModuleCollectingPickler(buffer)
    try:
        pickler.dump((fn, args))
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"run_ranks cannot send {name} and its args to the ranks: {type(error).__name__}: {error}"
        ) from error
    return pickler.modules, buffer.getvalue()


def import_modules(modules: dict[str, str]) -> None:
    """Import each module (name -> file) under its name, so that a pickle that names it can be loaded.

    A test module that pytest imported with ``--import-mode=importlib`` has a name (``tests.test_x``) that cannot
    always be found on ``sys.path``; and a kept rank may have a module of another file under the same name.
    """
    for name, file in modules.items():
        if _file_of(sys.modules.get(name)) == file:
            continue
        sys.modules.pop(name, None)
        root = _root(name, Path(file))
        if root is not None and root not in sys.path:
            sys.path.append(root)
        try:
            found = _file_of(importlib.import_module(name)) == file
        except ImportError:
            found = False
        if not found:
            _import_from_file(name, file)


def _file_of(module: ModuleType | None) -> str | None:
    file = getattr(module, "__file__", None)
    return None if file is None else str(Path(file).resolve())


def _root(name: str, file: Path) -> str | None:
    """The folder from which ``import name`` finds ``file``, if the names of the folders of ``file`` match."""
    parts = name.split(".")
    steps = file.parent.parts if file.name == "__init__.py" else file.with_suffix("").parts
    return str(Path(*steps[: -len(parts)])) if list(steps[-len(parts) :]) == parts else None


def _import_from_file(name: str, file: str) -> None:
    parents = name.split(".")[:-1]
    for depth in range(1, len(parents) + 1):
        parent = ".".join(parents[:depth])
        try:
            importlib.import_module(parent)
        except ImportError:
            # `import a.b` imports `a` first, even if sys.modules has `a.b`.
            sys.modules[parent] = ModuleType(parent)
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot import {name} from {file}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
