"""What travels between the caller and its ranks: plain pickles, and the modules that these need.

Ordinary pickle on purpose: torch's multiprocessing reductions would pass CPU tensors as file descriptors of
shared memory, which run out, and which die with the rank that made them.
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

# Messages that are no pickles. Neither can be mistaken for one: a pickle starts with b"\x80".
STOP = b"stop"  # to a rank: end
LEAVE = b"leave"  # to a rank: every rank has answered, so the process group can be closed
IDLE = b"idle"  # from a rank: the process group is closed, ready for the next task


@dataclass(frozen=True)
class Task:
    """One call on one rank, and what of the caller's surroundings it needs."""

    rank: int
    world_size: int
    store: str
    timeout: float
    environ: dict[str, str]
    sys_path: list[str]
    cwd: str
    modules: dict[str, str]
    call: bytes


@dataclass(frozen=True)
class Returned:
    """The rank's function returned; ``result`` is its pickle."""

    result: bytes


@dataclass(frozen=True)
class Raised:
    """The rank's function raised, at time ``at`` of the machine-wide monotonic clock."""

    summary: str
    traceback: str
    exception: bytes | None
    at: float


class _ModuleCollectingPickler(pickle.Pickler):
    """Notes the module of every function and class that the pickle will name."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.modules: dict[str, str] = {}

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, FunctionType | type):
            file = getattr(sys.modules.get(obj.__module__), "__file__", None)
            if file is not None:
                self.modules[obj.__module__] = str(Path(file).resolve())
            if obj.__module__ == "__main__" and (file is None or not Path(file).exists()):
                raise InputError(
                    f"run_ranks got {obj.__qualname__}, defined in an interactive session or on the command "
                    "line, where the ranks cannot import it: put it in a file."
                )
        return NotImplemented


def pickle_call(fn: Callable[..., object], args: tuple[Any, ...]) -> tuple[dict[str, str], bytes]:
    """Pickle ``(fn, args)``; return the modules that it names (name -> file) and the pickle.

    Raises:
        InputError: ``fn`` or one of ``args`` does not pickle, or lives where no other process can import it.
    """
    name = getattr(fn, "__qualname__", repr(fn))
    if "<lambda>" in name or "<locals>" in name:
        kind = "a lambda" if "<lambda>" in name else "defined inside another function"
        raise InputError(
            f"run_ranks got {name}, which is {kind}; the ranks are other processes and import what they run: "
            "move it to the top level of a module and pass what it needs through args."
        )
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
    """Make each module (name -> file) importable by its name, so that a pickle which names it loads.

    A test module that pytest imported with ``--import-mode=importlib`` has a name (``tests.test_x``) that
    ``sys.path`` need not lead to; and a kept rank may hold another file's module under the same name.
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
    """The folder from which ``import name`` finds ``file``, if the names of its folders say so."""
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
            # `import a.b` looks for `a` first, even where sys.modules holds `a.b`
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
