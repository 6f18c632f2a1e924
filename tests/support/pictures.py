"""The texts of pictures that matplotlib has drawn, and where they are."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import combinations
from typing import NamedTuple

# Boxes of text that touch by less than this, in pixels, do not overlap for a reader.
_TOUCHING = 1.0


class Drawn(NamedTuple):
    """A text, or a frame, of a picture: left, bottom, right, top in pixels."""

    text: str
    box: tuple[float, float, float, float]

    def overlaps(self, other: "Drawn") -> bool:
        (left, bottom, right, top), (other_left, other_bottom, other_right, other_top) = self.box, other.box
        wide = min(right, other_right) - max(left, other_left)
        high = min(top, other_top) - max(bottom, other_bottom)
        return min(wide, high) > _TOUCHING


class Picture(NamedTuple):
    """What was drawn: all texts, those of them that name ticks, the axes' frames, the legends, the whole."""

    texts: list[Drawn]
    ticks: list[Drawn]
    frames: list[Drawn]
    legends: list[Drawn]
    whole: Drawn

    def faults(self) -> list[str]:
        """What a reader would complain about, as sentences; empty if the picture is right."""
        found = [f"{a.text!r} overlaps {b.text!r}" for a, b in combinations(self.texts, 2) if a.overlaps(b)]
        found += [f"{t.text!r} is inside of the axes" for t in self.ticks for f in self.frames if t.overlaps(f)]
        found += [f"a formula is not drawn: {t.text!r}" for t in self.texts if "mathdefault" in t.text]
        found += [f"{t.text!r} is cut off" for t in (*self.texts, *self.legends) if not _within(t, self.whole)]
        return found


def _within(inner: Drawn, outer: Drawn) -> bool:
    (left, bottom, right, top), (x0, y0, x1, y1) = inner.box, outer.box
    slack = _TOUCHING
    return left > x0 - slack and bottom > y0 - slack and right < x1 + slack and top < y1 + slack


@contextmanager
def recorded_pictures() -> Iterator[list[Picture]]:
    """A list that gets every figure that is saved inside of the block."""
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    pictures: list[Picture] = []
    texts: dict[Text, Drawn] = {}
    save, draw, draw_text = Figure.savefig, Figure.draw, Text.draw
    last: list[Picture] = []

    def recording_text(self, renderer, *args, **kwargs):
        draw_text(self, renderer, *args, **kwargs)
        if self.get_visible() and self.get_text().strip():
            texts[self] = Drawn(self.get_text(), self.get_window_extent(renderer).extents)

    def recording(self, renderer, *args, **kwargs):
        texts.clear()
        draw(self, renderer, *args, **kwargs)
        axes = [ax for ax in self.axes if ax.get_visible()]
        labels = {
            label for ax in axes for axis in (ax.xaxis, ax.yaxis) for label in axis.get_ticklabels(which="both")
        }
        legends = [each for each in (*self.legends, *(ax.get_legend() for ax in axes)) if each is not None]
        last[:] = [
            Picture(
                list(texts.values()),
                [box for text, box in texts.items() if text in labels],
                [Drawn("axes", ax.get_window_extent(renderer).extents) for ax in axes],
                [Drawn("legend", legend.get_window_extent(renderer).extents) for legend in legends],
                Drawn("picture", self.bbox.extents),
            )
        ]

    def saving(self, *args, **kwargs):
        result = save(self, *args, **kwargs)
        pictures.extend(last)  # a figure is drawn several times, and its layout is right the last time
        return result

    Figure.savefig, Figure.draw, Text.draw = saving, recording, recording_text
    try:
        yield pictures
    finally:
        Figure.savefig, Figure.draw, Text.draw = save, draw, draw_text
