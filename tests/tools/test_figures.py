"""Logarithmic axes have plain tick labels, in every picture that has such an axis."""

from io import BytesIO

import pytest
from pictures import recorded_pictures

from syncnorm.tools.report.figures import log_scale, png, tick_label


@pytest.mark.parametrize(
    ("value", "label"),
    [
        (1e-7, "1e-7"),
        (2e-12, "2e-12"),
        (0.01, "0.01"),
        (0.5, "0.5"),
        (1, "1"),
        (20000, "20,000"),
        (1e6, "1e6"),
        (2.5e9, "2e9"),
    ],
)
def test_a_label_is_a_plain_number(value, label):
    assert tick_label(value) == label


@pytest.mark.parametrize(
    ("limits", "base"), [((1e-9, 1), 10), ((3, 9), 10), ((40, 70), 10), ((1, 2e7), 10), ((1, 64), 2), ((2, 4096), 2)]
)
def test_every_range_has_labels_that_can_be_read(limits, base):
    with recorded_pictures() as pictures, png(BytesIO(), (4, 3)) as figure:
        ax = figure.subplots()
        log_scale(ax.yaxis, base)
        ax.set_ylim(*limits)
    (picture,) = pictures
    assert picture.faults() == []
    values = [float(tick.text.replace(",", "")) for tick in picture.ticks if tick.box[2] < picture.frames[0].box[0]]
    assert len(values) >= 2
    assert values == sorted(values)
    assert all(limits[0] * 0.99 <= value <= limits[1] * 1.01 for value in values)
