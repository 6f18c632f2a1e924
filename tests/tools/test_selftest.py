"""The self-test passes on this machine, and fails if something is wrong on one rank only."""

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
from syncnorm.tools.report.selftest import render
from syncnorm.tools.selftest import runner
from syncnorm.tools.selftest.case_context import Batch, CaseContext
from syncnorm.tools.selftest.cases import CASES, Case, single_rank, step
from syncnorm.tools.selftest.records import Measured, SelfTest, Verdict, combine
from syncnorm.tools.selftest.runner import WAIT, run_cases, selftest

QUICK = [case.name for case in CASES if case.name not in ("torch.compile, fullgraph", "steps of DDP = one process")]


def _rank_run_cases(names: list[str]) -> SelfTest:
    """Runs the cases called ``names``, of the self-test and of those below."""
    known = {case.name: case for case in (*CASES, *BROKEN)}
    with initialized_ranks(torch.device("cpu"), WAIT) as ranks:
        return run_cases(ranks, lambda name: None, [known[name] for name in names])


def _unsynced(context: CaseContext) -> None:
    """No rank synchronizes, and rank 1 has another layer."""
    batch = Batch.even(context)
    layer, x = batch.layer(context), batch.x(context).requires_grad_()
    if context.rank == 1:
        layer = torch.nn.BatchNorm2d(batch.channels, momentum=layer.momentum)
        y = layer(x)
    else:
        with syncnorm.no_sync_stats():
            y = layer(x)
    y.backward(batch.dy(context))
    batch.check(context, y, x.grad, layer)


def _raising(context: CaseContext) -> None:
    if context.rank == 1:
        raise ValueError("planted")
    step(context, Batch.even(context))


def _diverging(context: CaseContext) -> None:
    context.check_same_on_all_ranks("a buffer", torch.tensor([1.0, float(context.rank)]))


def _dying(context: CaseContext) -> None:
    if context.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier(group=context.group)


BROKEN = (
    Case("unsynced", _unsynced),
    Case("raising", _raising),
    Case("diverging", _diverging),
    Case("dying", _dying),
    Case("only on rank 0", _diverging, lambda context: "no such unit" if context.rank == 1 else None),
)


@pytest.mark.parametrize("world_size", [1, 2])
def test_cases_pass(world_size):
    records = run_ranks(_rank_run_cases, world_size, (QUICK,))
    by_name = {case.name: case for case in records[0].cases}
    skipped = {case.name for case in CASES if case.unless is single_rank} if world_size == 1 else set()
    for case in by_name.values():
        expected = "skip" if case.name in skipped | {"no host sync", "CUDA graph"} else "pass"
        assert case.status == expected, case
    assert by_name["forward and backward, fp64"].error < 1e-12
    assert records[0].passed


def test_a_wrong_rank_fails_its_case_and_the_next_one_runs():
    names = ["unsynced", "channels_last", "diverging", "only on rank 0", "a mask"]
    for record in run_ranks(_rank_run_cases, 2, (names,)):
        unsynced, after, diverged, skipped, last = record.cases
        assert (unsynced.status, after.status, diverged.status, last.status) == ("fail", "pass", "fail", "pass")
        assert "ranks 0, 1 failed" in unsynced.message or "rank 1" in unsynced.message
        assert diverged.message == "rank 1: a buffer is not bitwise equal to that of rank 0"
        assert (skipped.status, skipped.message) == ("skip", "rank 1: no such unit")
        assert not record.passed


def test_an_exception_on_one_rank_is_reported_and_the_next_case_has_a_group_that_works():
    record = run_ranks(_rank_run_cases_with_short_timeout, 2, (["raising", "channels_last"],))[0]
    raised, after = record.cases
    assert (raised.status, raised.rank) == ("fail", 0)  # rank 0 waited for rank 1 until the timeout
    assert "rank 1: ValueError: planted" in raised.message
    assert after.status == "pass"


def _rank_run_cases_with_short_timeout(names: list[str]) -> SelfTest:
    kept, runner.CASE_TIMEOUT = runner.CASE_TIMEOUT, timedelta(seconds=2)
    try:
        return _rank_run_cases(names)
    finally:
        runner.CASE_TIMEOUT = kept


def test_a_rank_that_dies_leaves_the_rest_not_run(monkeypatch):
    monkeypatch.setattr(runner, "_selftest_on_rank", _rank_dying)  # in this process; the ranks import it by its name
    record = selftest(2)
    assert [case.status for case in record.cases] == ["pass", "fail", "not run"]
    assert "rank 1" in record.cases[1].message
    assert "SIGKILL" in record.cases[1].message
    assert not record.passed


def _rank_dying(ranks, progress):
    by_name = {case.name: case for case in (*CASES, *BROKEN)}
    runner.CASES = [by_name[name] for name in ("channels_last", "dying", "a mask")]
    try:
        return ORIGINAL(ranks, progress)
    finally:
        runner.CASES = CASES


ORIGINAL = runner._selftest_on_rank


def test_one_rank_out_of_tolerance_is_the_one_that_is_named():
    near, far = Measured("dx", 1e-6, 1e-5), Measured("dx", 1e-4, 1e-5)
    case = combine("a case", [Verdict([near]), Verdict([near]), Verdict([near, far])], 0.1)
    assert (case.status, case.rank, case.error) == ("fail", 2, 1e-4)
    assert case.message == "rank 2: error of dx is 1.0e-04, tolerance 1e-05"
    infinite = combine("a case", [Verdict([Measured("dx", float("inf"), 1e-5)])], 0.1)
    assert (infinite.status, infinite.error) == ("fail", None)  # JSON has no infinity


def test_a_nan_fails():
    context = CaseContext(0, 1, torch.device("cpu"), "gloo", None, None)
    context.check_close("y", torch.tensor([1.0, torch.nan]), torch.ones(2), torch.float32)
    assert combine("a case", [context.verdict], 0.0).status == "fail"


def call(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["syncnorm", *arguments])
    code = main()
    return code, *capsys.readouterr()


def test_a_failure_is_exit_code_1_and_the_last_line(monkeypatch, capsys, tmp_path):
    record = run_ranks(_rank_run_cases, 2, (["channels_last", "diverging"],))[0]
    # By its path, because the package has a command with the name of the module.
    command = importlib.import_module("syncnorm.tools.cli.selftest")
    monkeypatch.setattr(command, "run_selftest", lambda *arguments: record)
    code, out, _ = call(monkeypatch, capsys, "selftest", "--ranks", "2", "--json", str(tmp_path / "x.json"))
    assert code == 1
    assert out.splitlines()[-1].startswith("FAILED: 1 passed, 1 failed.")
    written = json.loads((tmp_path / "x.json").read_text())
    assert (written["schema"], written["passed"]) == ("syncnorm.selftest", False)
    assert [case["status"] for case in written["cases"]] == ["pass", "fail"]


def test_with_one_rank_it_says_that_nothing_was_synchronized():
    record = run_ranks(_rank_run_cases, 1, (["channels_last", "an empty rank"],))[0]
    console = Console(width=100, file=StringIO())
    console.print(render(record))
    assert "nothing was synchronized" in console.file.getvalue()


def test_bad_numbers_of_ranks(monkeypatch, capsys):
    code, out, err = call(monkeypatch, capsys, "selftest", "--ranks", "0")
    assert (code, out) == (2, "")
    assert err == "syncnorm selftest: selftest needs at least 1 rank, got 0: ask for --ranks 2\n"
