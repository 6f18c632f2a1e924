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
    original = Exchange._begin

    def begin(self: Any, call: Any, *args: Any, **options: Any) -> Any:
        kinds.append(call.kind.name)
        return original(self, call, *args, **options)

    with mock.patch.object(Exchange, "_begin", begin):
        yield kinds
