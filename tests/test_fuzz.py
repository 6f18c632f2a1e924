"""The short form of ``python tests/fuzz.py``."""

import fuzz


def test_random_cases_equal_the_whole_batch():
    found = fuzz.mismatches(150)
    assert not found, "\n".join(f"{case}\n{message}" for case, message in found)
