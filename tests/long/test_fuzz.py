"""The short form of ``python tests/long/fuzz.py``."""

import fuzz
import pytest

pytestmark = pytest.mark.slow


def test_random_cases_equal_the_whole_batch():
    found = fuzz.fuzz(150)
    assert found.cases == 150
    assert not found.mismatches, "\n".join(f"{case}\n{message}" for case, message in found.mismatches)
