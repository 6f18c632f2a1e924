"""Durations as a user writes them: ``90s``, ``10m``, ``1.5h``."""

from __future__ import annotations

import re

from syncnorm.errors import InputError

_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)([smh])", re.ASCII)


def seconds(text: str) -> float:
    """The seconds of a positive number with a unit: s, m or h.

    Raises:
        InputError: ``text`` is something else.

    Example:
        >>> seconds("90s"), seconds("10m"), seconds("1.5h")
        (90.0, 600.0, 5400.0)
    """
    found = _DURATION.fullmatch(text.strip().lower())
    duration = float(found[1]) * _SECONDS[found[2]] if found else 0.0
    if not 0 < duration < float("inf"):
        raise InputError(f"expected a duration such as 90s, 10m or 1.5h, got {text!r}")
    return duration
