"""Durations as a user writes them."""

import pytest

from syncnorm.errors import InputError
from syncnorm.tools.common.durations import seconds


@pytest.mark.parametrize(("text", "expected"), [
    ("90s", 90.0),
    ("10m", 600.0),
    ("1h", 3600.0),
    ("1.5H", 5400.0),
    (" 0.5s ", 0.5),
])  # fmt: skip
def test_a_number_with_a_unit(text, expected):
    assert seconds(text) == expected


@pytest.mark.parametrize(
    "text", ["", "10", "m", "10 m", "-10m", "0s", "1e3s", "10min", "1h30m", "nan", ".5h", "9" * 400 + "h"]
)
def test_anything_else_is_refused_with_examples(text):
    with pytest.raises(InputError, match=r"expected a duration such as 90s, 10m or 1\.5h, got '"):
        seconds(text)
