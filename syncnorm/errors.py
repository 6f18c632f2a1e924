"""The errors that syncnorm raises on its own, and which of all errors the other ranks know of."""

from typing import TypeVar

E = TypeVar("E", bound=BaseException)

_exchanges = 0  # that have begun
REFUSED = "its own input was refused"  # why a rank that raises an InputError does not take part


class SyncNormError(RuntimeError):
    """Base of every error that the library raises on its own."""


class InputError(SyncNormError, ValueError):
    """An argument that no rank could have used: a wrong shape, width, dtype, option or group.

    Also a ``ValueError``, because that is what ``torch.nn``'s batch norms raise for the same mistakes.
    """


def exchange_begins() -> None:
    """To be called by each: what is raised from then on is another event, if it is the same object."""
    global _exchanges
    _exchanges += 1


def known_everywhere(error: E) -> E:
    """Marks ``error`` as one that the other ranks raise as well, or have been told of."""
    error.__dict__["_syncnorm_known_since"] = _exchanges
    return error


def is_known_everywhere(error: BaseException) -> bool:
    """Whether nobody has to be told of ``error`` any more."""
    return error.__dict__.get("_syncnorm_known_since") == _exchanges
