"""The self-test: that it passes here, and that what is wrong on one rank alone fails it."""

import importlib
import json
import os
import signal
import sys
from datetime import timedelta
from io import StringIO

import pytest
import torch
import torch.distributed as dist
from rich.console import Console

import syncnorm
from syncnorm.__main__ import main
from syncnorm.testing import run_ranks
from syncnorm.tools.common.ranks import initialized_ranks
from syncnorm.tools.report.selftest_terminal import render
from syncnorm.tools.selftest import runner as module
from syncnorm.tools.selftest import session
from syncnorm.tools.selftest.batch import Batch
from syncnorm.tools.selftest.case_context import Trial
from syncnorm.tools.selftest.cases import CASES, Case, _step, alone
from syncnorm.tools.selftest.records import Measured, SelfTest, Verdict, outcome
from syncnorm.tools.selftest.runner import WAIT, selftest
from syncnorm.tools.selftest.session import prove_on_rank

QUICK = [case.name for case in CASES if case.name not in ("torch.compile, fullgraph", "steps of DDP = one process")]


def proven(names: list[str]) -> SelfTest:
    """The cases called ``names``, of the self-test's own and of those below, on this rank."""
    known = {case.name: case for case in (*CASES, *BROKEN)}
    with initialized_ranks(torch.device("cpu"), WAIT) as ranks:
        return prove_on_rank(ranks, lambda name: None, [known[name] for name in names])


def lopsided(trial: Trial) -> None:
    """The second rank forgets the others."""
    batch = Batch.even(trial)
    layer, x = batch.layer(trial), batch.x(trial).requires_grad_()
    if trial.rank == 1:
        layer = torch.nn.BatchNorm2d(batch.channels, momentum=layer.momentum)
        y = layer(x)
    else:
        with syncnorm.no_sync_stats():
            y = layer(x)
    y.backward(batch.dy(trial))
    batch.compare(trial, y, x.grad, layer)


def raising(trial: Trial) -> None:
    if trial.rank == 1:
        raise ValueError("planted")
    _step(trial, Batch.even(trial))


def diverging(trial: Trial) -> None:
    trial.same_on_all_ranks("a buffer", torch.tensor([1.0, float(trial.rank)]))


def dying(trial: Trial) -> None:
    if trial.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier(group=trial.group)


BROKEN = (
    Case("lopsided", lopsided),
    Case("raising", raising),
    Case("diverging", diverging),
    Case("dying", dying),
    Case("only on rank 0", diverging, lambda trial: "no such unit" if trial.rank == 1 else None),
)


@pytest.mark.parametrize("world_size", [1, 2])
def test_cases_pass(world_size):
    records = run_ranks(proven, world_size, (QUICK,))
    by_name = {case.name: case for case in records[0].cases}
    skipped = {case.name for case in CASES if case.unless is alone} if world_size == 1 else set()
    for case in by_name.values():
        expected = "skip" if case.name in skipped | {"no host sync", "CUDA graph"} else "pass"
        assert case.status == expected, case
    assert by_name["forward and backward, fp64"].error < 1e-12
    assert records[0].passed


def test_a_wrong_rank_fails_its_case_and_the_next_one_runs():
    names = ["lopsided", "channels_last", "diverging", "only on rank 0", "a mask"]
    for record in run_ranks(proven, 2, (names,)):
        lop, after, diverged, skipped, last = record.cases
        assert (lop.status, after.status, diverged.status, last.status) == ("fail", "pass", "fail", "pass")
        assert "ranks 0, 1 failed" in lop.message or "rank 1" in lop.message
        assert diverged.message == "rank 1: a buffer is not, bit for bit, that of rank 0"
        assert (skipped.status, skipped.message) == ("skip", "rank 1: no such unit")
        assert not record.passed


def test_an_exception_on_one_rank_is_told_and_the_next_case_has_a_group_that_works():
    record = run_ranks(impatient, 2, (["raising", "channels_last"],))[0]
    raised, after = record.cases
    assert (raised.status, raised.rank) == ("fail", 0)  # rank 0 waited for rank 1, in vain
    assert "rank 1: ValueError: planted" in raised.message
    assert after.status == "pass"


def impatient(names: list[str]) -> SelfTest:
    kept, session.PATIENCE = session.PATIENCE, timedelta(seconds=2)
    try:
        return proven(names)
    finally:
        session.PATIENCE = kept


def test_a_rank_that_dies_leaves_the_rest_not_run(monkeypatch):
    monkeypatch.setattr(module, "_prove_on_rank", dying_rank)  # in this process; the ranks look it up by its name
    record = selftest(2)
    assert [case.status for case in record.cases] == ["pass", "fail", "not run"]
    assert "rank 1" in record.cases[1].message
    assert "SIGKILL" in record.cases[1].message
    assert not record.passed


def dying_rank(ranks, progress):
    module.CASES = [case for case in CASES if case.name == "channels_last"]
    module.CASES += [case for case in BROKEN if case.name == "dying"]
    module.CASES += [case for case in CASES if case.name == "a mask"]
    try:
        return ORIGINAL(ranks, progress)
    finally:
        module.CASES = CASES


ORIGINAL = module._prove_on_rank


def test_one_rank_out_of_tolerance_is_the_one_that_is_named():
    near, far = Measured("dx", 1e-6, 1e-5), Measured("dx", 1e-4, 1e-5)
    case = outcome("a case", [Verdict([near]), Verdict([near]), Verdict([near, far])], 0.1)
    assert (case.status, case.rank, case.error) == ("fail", 2, 1e-4)
    assert case.message == "rank 2: dx is 1.0e-04 off, 1e-05 allowed"
    infinite = outcome("a case", [Verdict([Measured("dx", float("inf"), 1e-5)])], 0.1)
    assert (infinite.status, infinite.error) == ("fail", None)  # JSON knows no infinity


def test_a_nan_fails():
    trial = Trial(0, 1, torch.device("cpu"), "gloo", None, None)  # type: ignore[arg-type]
    trial.close("y", torch.tensor([1.0, torch.nan]), torch.ones(2), torch.float32)
    assert outcome("a case", [trial.verdict], 0.0).status == "fail"


def call(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["syncnorm", *arguments])
    code = main()
    return code, *capsys.readouterr()


def test_a_failure_is_exit_code_1_and_the_last_line(monkeypatch, capsys, tmp_path):
    record = run_ranks(proven, 2, (["channels_last", "diverging"],))[0]
    # By its path: the package holds a command of the module's name.
    command = importlib.import_module("syncnorm.tools.cli.selftest")
    monkeypatch.setattr(command, "run_selftest", lambda *arguments: record)
    code, out, _ = call(monkeypatch, capsys, "selftest", "--ranks", "2", "--json", str(tmp_path / "x.json"))
    assert code == 1
    assert out.splitlines()[-1].startswith("FAILED: 1 passed, 1 failed.")
    written = json.loads((tmp_path / "x.json").read_text())
    assert (written["schema"], written["passed"]) == ("syncnorm.selftest", False)
    assert [case["status"] for case in written["cases"]] == ["pass", "fail"]


def test_a_world_of_one_says_that_nothing_was_synced():
    record = run_ranks(proven, 1, (["channels_last", "an empty rank"],))[0]
    console = Console(width=100, file=StringIO())
    console.print(render(record))
    assert "nothing was synced" in console.file.getvalue()


def test_bad_numbers_of_ranks(monkeypatch, capsys):
    code, out, err = call(monkeypatch, capsys, "selftest", "--ranks", "0")
    assert (code, out) == (2, "")
    assert err == "syncnorm selftest: selftest needs at least 1 ranks, got 0: ask for --ranks 2\n"
