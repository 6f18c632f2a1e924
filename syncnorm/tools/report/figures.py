"""The matplotlib figures that plots are drawn in, and their logarithmic axes.

Text is shown literally: a ``$`` does not start a formula. matplotlib's own labels of a logarithmic axis are formulas.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

from syncnorm.tools.common.files import write_file


@contextmanager
def figure(file: BytesIO, size: tuple[float, float], look: dict[str, Any], layout: Any, **save: Any) -> Iterator[Any]:
    """Yields a figure of ``size`` inches with the rcParams ``look``; saves it to ``file`` when the block ends."""
    # Imported here because it takes a second, which only a run that draws should pay.
    import matplotlib
    from matplotlib.figure import Figure

    literal: Any = {"text.parse_math": False, "text.usetex": False}
    with matplotlib.rc_context(literal | look), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # matplotlib draws a box in its place
        drawn = Figure(figsize=size, layout=layout)
        yield drawn
        drawn.savefig(file, **save)


@contextmanager
def png(
    file: Path | BinaryIO, size: tuple[float, float], layout: Any = "constrained", dpi: int = 120
) -> Iterator[Any]:
    """Yields a figure of ``size`` inches to draw in; writes it to ``file`` when the block ends."""
    drawn = BytesIO()
    with figure(drawn, size, {}, layout, format="png", dpi=dpi) as empty:
        yield empty
    if isinstance(file, Path):
        write_file(file, drawn.getvalue())
    else:
        file.write(drawn.getvalue())


def log_scale(axis: Any, base: int = 10) -> None:
    """Makes ``axis`` (``ax.xaxis`` or ``ax.yaxis``) logarithmic, with tick labels such as ``20,000`` and ``1e-7``."""
    scale = axis.axes.set_xscale if axis.axis_name == "x" else axis.axes.set_yscale
    scale("log", base=base)
    formatter = _log_formatter()
    axis.set_major_formatter(formatter(base))
    axis.set_minor_formatter(formatter(base))


@cache
def _log_formatter() -> Any:
    from matplotlib.ticker import LogFormatter

    class PlainLogFormatter(LogFormatter):
        def __call__(self, x: float, pos: int | None = None) -> str:
            # matplotlib decides which ticks get a label: minor ones only on an axis of about one decade or less.
            return tick_label(x) if super().__call__(x, pos) else ""

    return PlainLogFormatter


def tick_label(value: float) -> str:
    """A positive number as a tick label: ``0.05``, ``20,000``, ``1e-7``."""
    if 0.01 <= value < 1e6:
        return f"{value:,.6g}"
    digits, exponent = f"{value:.0e}".split("e")
    return f"{digits}e{int(exponent)}"
