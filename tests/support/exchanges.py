"""Records what this rank exchanges with the others."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from syncnorm.comm.call import Call
from syncnorm.comm.exchange import Exchange
from syncnorm.comm.native import NativeCollectives


@contextmanager
def recorded_exchanges() -> Iterator[list[str]]:
    """Yields a list to which each exchange, or native collective, adds its kind: ``"FORWARD"`` or ``"BACKWARD"``."""
    kinds: list[str] = []

    def recording(function: Callable[..., Any]) -> Callable[..., Any]:
        def recorded(self: Any, call: Call, *args: Any, **kwargs: Any) -> Any:
            if not isinstance(self, Exchange) or self._observed:  # not while it compares a native call
                kinds.append(call.kind.name)
            return function(self, call, *args, **kwargs)

        return recorded

    with (
        mock.patch.object(Exchange, "_begin", recording(Exchange._begin)),
        mock.patch.object(NativeCollectives, "begin", recording(NativeCollectives.begin)),
    ):
        yield kinds
