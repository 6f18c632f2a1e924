"""Records what this rank exchanges with the others."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from syncnorm.comm import native
from syncnorm.comm.exchange import Exchange


@contextmanager
def recorded_exchanges() -> Iterator[list[str]]:
    """Yields a list to which each exchange, or native collective, adds its kind: ``"FORWARD"`` or ``"BACKWARD"``."""
    kinds: list[str] = []

    def recording(function: Callable[..., Any], place: int) -> Callable[..., Any]:
        def recorded(*args: Any, **kwargs: Any) -> Any:
            kinds.append(args[place].kind.name)
            return function(*args, **kwargs)

        return recorded

    with (
        mock.patch.object(Exchange, "_begin", recording(Exchange._begin, 1)),
        mock.patch.object(native, "gather", recording(native.gather, 2)),
        mock.patch.object(native, "reduce", recording(native.reduce, 2)),
    ):
        yield kinds
