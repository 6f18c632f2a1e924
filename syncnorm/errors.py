"""The errors that syncnorm raises on its own."""


class SyncNormError(RuntimeError):
    """Base of every error that the library raises on its own."""


class InputError(SyncNormError, ValueError):
    """An argument that no rank could have used: a wrong shape, width, dtype, option or group.

    Also a ``ValueError``, because that is what ``torch.nn``'s batch norms raise for the same mistakes.
    """
