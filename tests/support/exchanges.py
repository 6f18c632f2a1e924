"""Records what this rank exchanges over gloo."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from syncnorm.comm.exchange import Exchange


@contextmanager
def recorded_exchanges() -> Iterator[list[str]]:
    """Yields a list to which each exchange adds its kind: ``"FORWARD"`` or ``"BACKWARD"``."""
    kinds: list[str] = []
    original = Exchange.start

    def start(self: Any, call: Any, *args: Any) -> Any:
        kinds.append(call.kind.name)
        return original(self, call, *args)

    with mock.patch.object(Exchange, "start", start):
        yield kinds
