"""The short form of ``python tests/long/faults.py``."""

import faults
import pytest

pytestmark = pytest.mark.slow

DISAGREEMENTS = ("skip", "reorder", "widen", "extra", "nan", "models", "thread", "version")


@pytest.mark.parametrize("kinds", [DISAGREEMENTS, tuple(faults.KINDS.keys() - set(DISAGREEMENTS))])
def test_ranks_that_survive_a_fault_end_in_time_and_say_why(kinds):
    kinds = sorted(kinds)
    verdicts = faults.run(len(kinds), seed=0, timeout=5, jobs=3, show=False, kinds=kinds)
    failures = "\n".join(text for verdict in verdicts for text in (faults.line(verdict), *verdict.failures))
    assert not faults.failed(verdicts), f"{faults.table(verdicts)}\n{failures}"
    assert {verdict.fault.kind for verdict in verdicts} == set(kinds)
    for verdict in verdicts:
        assert verdict.outcomes, "no rank survived"
