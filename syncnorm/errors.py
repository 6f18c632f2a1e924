"""The errors that syncnorm raises on its own, and which of all errors the other ranks know of."""

from typing import TypeVar

E = TypeVar("E", bound=BaseException)

REFUSED = "its own input was refused"  # why a rank that raises an InputError does not take part


class SyncNormError(RuntimeError):
    """Base of every error that the library raises on its own."""


class InputError(SyncNormError, ValueError):
    """An argument that no rank could have used: a wrong shape, width, dtype, option or group.

    Also a ``ValueError``, because that is what ``torch.nn``'s batch norms raise for the same mistakes.
    """


def known_everywhere(error: E) -> E:
    """Marks ``error`` as one that the other ranks raise as well, or have been told of."""
    error.__dict__["_syncnorm_known_everywhere"] = True
    return error


def is_known_everywhere(error: BaseException) -> bool:
    """Whether nobody has to be told of ``error`` any more."""
    return "_syncnorm_known_everywhere" in error.__dict__
