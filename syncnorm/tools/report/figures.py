"""The matplotlib figures that plots are drawn in. Text is shown literally: a ``$`` does not start a formula."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
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
