"""Hooks that stay behind when a model is copied or saved: what belongs to a run is no part of the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class RunHook:
    """A forward pre-hook, for ``register_forward_pre_hook(..., with_kwargs=True)``.

    A copy, or what a pickle brings back, does nothing.
    """

    def __init__(self, function: Callable[[Any, tuple[Any, ...], dict[str, Any]], None] | None = None):
        self._function = function

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """What the module is called with is looked at, and goes on as it is."""
        if self._function is not None:
            self._function(module, args, kwargs)

    def __reduce__(self) -> tuple[Any, ...]:  # deepcopy's way as well
        return RunHook, ()
