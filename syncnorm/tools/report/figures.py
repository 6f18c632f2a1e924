"""The matplotlib figures that plots are drawn in, and their logarithmic axes.

Text is shown literally: a ``$`` does not start a formula. matplotlib's own labels of a logarithmic axis are formulas.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

from rich.cells import cell_len

from syncnorm.tools.common.files import write_file

# Fonts with Chinese characters, which matplotlib's own font lacks, on Linux, macOS and Windows.
_CHINESE_FONTS = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Source Han Sans SC",
    "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei",
    "PingFang SC",
    "Hiragino Sans GB",
    "Microsoft YaHei",
    "SimHei",
)


@contextmanager
def figure(file: BytesIO, size: tuple[float, float], look: dict[str, Any], layout: Any, **save: Any) -> Iterator[Any]:
    """Yields a figure of ``size`` inches with the rcParams ``look``; saves it to ``file`` when the block ends."""
    # Imported here because it takes a second, which only a run that draws should pay.
    import matplotlib
    from matplotlib.figure import Figure

    text: Any = {"text.parse_math": False, "text.usetex": False, "font.family": _font_families()}
    with (
        matplotlib.rc_context(text | look),
        warnings.catch_warnings(),
        _quiet(logging.getLogger("matplotlib.font_manager")),
    ):
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # matplotlib draws a box in its place
        drawn = Figure(figsize=size, layout=layout)
        yield drawn
        drawn.savefig(file, **save)


@contextmanager
def _quiet(logger: logging.Logger) -> Iterator[None]:
    """Without its warnings: that a font has no such weight is no news to the user."""
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


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


@cache
def _font_families() -> list[str]:
    """The font of matplotlib, and one for the characters that it lacks, if one is installed."""
    from matplotlib.font_manager import fontManager

    installed = set(fontManager.get_font_names())
    return ["DejaVu Sans", *[name for name in _CHINESE_FONTS if name in installed][:1]]


def legend_columns(labels: Sequence[str], width: float, points: float = 10) -> int:
    """How many entries of a legend fit next to each other in ``width`` inches, in a font of ``points``."""
    letter, marker = 0.0085, 0.07  # inches per point
    entry = points * (marker + letter * max(map(cell_len, labels)))
    return max(1, min(len(labels), int(width / entry)))


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
