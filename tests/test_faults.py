"""The short form of ``python tests/faults.py``."""

import faults


def test_ranks_that_survive_a_fault_end_in_time_and_say_why():
    verdicts = faults.run(8, seed=0, timeout=5, jobs=3, show=False)
    told = "\n".join(text for verdict in verdicts for text in (faults.line(verdict), *verdict.told))
    assert not faults.failed(verdicts), f"{faults.table(verdicts)}\n{told}"
    assert {verdict.fault.kind for verdict in verdicts} == set(faults.KINDS)
    by_kind = {verdict.fault.kind: verdict.outcomes for verdict in verdicts}
    for kind in ("skip", "reorder", "widen"):  # all ranks are told of the layer
        assert by_kind[kind].keys() == {"layer error"}
    assert by_kind["nan"].keys() == {"equal"}
