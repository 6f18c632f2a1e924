"""Exceptions as a command prints them: in one line, or as the extra that has to be installed."""

from __future__ import annotations

from textwrap import shorten

# Names of imported packages -> the extra of syncnorm that installs them.
_EXTRAS = {
    **dict.fromkeys(("accelerate", "scipy", "tomli"), "cli"),
    **dict.fromkeys(("click", "rich", "sklearn", "matplotlib", "jinja2", "mlxtend"), "compare"),
    "torchmetrics": "metrics",
}
_MAX_CHARACTERS = 500


def one_line(error: BaseException) -> str:
    """The type and the text of an exception in one line, and the file and line that raised it."""
    text = shorten(str(error), _MAX_CHARACTERS, placeholder=" ...")
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = f" ({trace.tb_frame.f_code.co_filename}:{trace.tb_lineno})" if trace else ""
    return f"{type(error).__name__}: {text}{where}" if text else f"{type(error).__name__}{where}"


def missing_extra(error: BaseException) -> str | None:
    """Which extra to install if ``error``, or the exception of a rank that caused it, is a missing package."""
    for each in (error, error.__cause__):
        package = (each.name or "").partition(".")[0] if isinstance(each, ModuleNotFoundError) else ""
        if package in _EXTRAS:
            return f'needs {package}: pip install "syncnorm[{_EXTRAS[package]}]"'
    return None
