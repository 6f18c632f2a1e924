"""The errors that syncnorm raises, and a mark for those that the other ranks know about."""

from typing import TypeVar

E = TypeVar("E", bound=BaseException)

_exchanges = 0  # started so far
REFUSED = "its own input was invalid"  # why a rank that raises an InputError does not take part


class SyncNormError(RuntimeError):
    """Base class of all errors that the library raises."""


class InputError(SyncNormError, ValueError):
    """An invalid argument: a wrong shape, number of channels, dtype, option or process group.

    It is also a ``ValueError``, because that is what ``torch.nn``'s batch norms raise for the same mistakes.
    """


def count_exchange() -> None:
    """To be called at the start of each exchange: the same error object, raised again later, is another event."""
    global _exchanges
    _exchanges += 1


def known_everywhere(error: E) -> E:
    """Marks ``error`` as known to the other ranks: they raise it as well, or this rank has reported it to them."""
    error.__dict__["_syncnorm_known_since"] = _exchanges
    return error


def is_known_everywhere(error: BaseException) -> bool:
    """Whether the other ranks already know about ``error``."""
    return error.__dict__.get("_syncnorm_known_since") == _exchanges
