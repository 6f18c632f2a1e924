"""The figures that pictures are drawn in: names stand there as they are, and a ``$`` in one begins no formula."""

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
    """A matplotlib figure of ``size`` inches to draw in, saved to ``file`` at the end; ``look``: its rcParams."""
    # Imported here: it takes a second, which only a run that draws should pay.
    import matplotlib
    from matplotlib.figure import Figure

    as_it_is: Any = {"text.parse_math": False, "text.usetex": False}
    with matplotlib.rc_context(as_it_is | look), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # a box stands for it
        drawn = Figure(figsize=size, layout=layout)
        yield drawn
        drawn.savefig(file, **save)


@contextmanager
def png(
    file: Path | BinaryIO, size: tuple[float, float], layout: Any = "constrained", dpi: int = 120
) -> Iterator[Any]:
    """A figure of ``size`` inches to draw in, written to ``file`` at the end."""
    drawn = BytesIO()
    with figure(drawn, size, {}, layout, format="png", dpi=dpi) as empty:
        yield empty
    if isinstance(file, Path):
        write_file(file, drawn.getvalue())
    else:
        file.write(drawn.getvalue())
