"""An environment as plain text to paste into a report."""

from __future__ import annotations

from collections.abc import Iterator

from syncnorm.tools.env import Environment


def env_text(found: Environment) -> str:
    """A line each, ``name: value``."""
    return "\n".join(f"{name}: {value}" for name, value in _lines(found))


def _lines(found: Environment) -> Iterator[tuple[str, str]]:
    yield "syncnorm", found.syncnorm
    yield "torch", found.torch
    for name, version in found.build.items():
        yield f"  {name}", version or "no"
    yield "  backends", ", ".join(found.backends) or "none"
    yield "Python", found.python
    for name, version in found.packages.items():
        yield f"  {name}", version or "not installed"
    yield "system", found.system
    yield "CPU", f"{found.cpu}, {found.cpu_count} cores, {found.threads} threads for torch"
    yield "GPUs", "none" if not found.gpus else ""
    for index, gpu in enumerate(found.gpus):
        yield f"  {index}", gpu
    yield "launcher", found.launcher or "none"
    yield "variables", "none" if not found.variables else ""
    for name, value in found.variables.items():
        yield f"  {name}", value
