"""Launches of Triton kernels."""

from typing import Any


def launch(kernel: Any, grid: tuple[int, int], *args: Any) -> None:
    """``kernel[grid](*args)``."""
    kernel[grid](*args)
