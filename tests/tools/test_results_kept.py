"""The result of a command is printed and written, whatever fails afterwards."""

import importlib
import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import replace
from io import BytesIO, StringIO
from pathlib import Path

import pytest
import records
import torch.distributed as dist
from rich.console import Console
from user_module import NAME, NETS, user_environ

import syncnorm.tools.bench.runner as bench_runner
import syncnorm.tools.study.runner as study_runner
from syncnorm.__main__ import main
from syncnorm.monitor.findings import Findings
from syncnorm.tools.cli.results import NOT_WRITTEN
from syncnorm.tools.report.consoles import PlainTable
from syncnorm.tools.report.figures import png
from syncnorm.tools.study.records import Outcome, StudyRow, View
from syncnorm.tools.study.trials import Trials, run_trials

FULL = "/dev/full"
COMPARE = ("compare", "--model", "nets:build", "--data", "nets:data", "--arms", "ddp", "--steps", "2")


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """Runs a command in this process, in an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call_main(*arguments):
        monkeypatch.setattr(sys, "argv", ["syncnorm", *arguments])
        return main(), *capsys.readouterr()

    return call_main


@pytest.fixture
def run(tmp_path):
    """Runs a command in a new process, in a folder with the user's module."""
    (tmp_path / "nets.py").write_text(NETS, encoding="utf-8")

    def run_command(*arguments, **environ):
        command = [sys.executable, "-m", "syncnorm", *arguments]
        return subprocess.run(command, capture_output=True, timeout=100, cwd=tmp_path, env=user_environ(**environ))

    return run_command


class Record:
    """The result of any command."""

    passed = True

    def to_dict(self):
        return {"found": 1}


FINDINGS = Findings(2, 4, 2, (1.0, 1.0), None, None, None, None, ())
COMMANDS = [
    (("compare",), {"sweep": lambda *arguments, **named: iter([Record()])}, "print_comparison"),
    (("bench",), {"run_layer_and_model": lambda *arguments, **named: Record()}, "print_benchmark"),
    (("study", "fold"), {"run": lambda *arguments, **named: Record()}, "print_study"),
    (("selftest",), {"run_selftest": lambda *arguments: Record()}, "print_selftest"),
    (("diagnose",), {"run_diagnose": lambda *arguments: FINDINGS}, "print_text"),
]


@pytest.fixture(params=COMMANDS, ids=lambda each: each[0][0])
def command(request, monkeypatch):
    """The words of a command whose work is replaced by its result."""
    words, work, shown = request.param
    module = importlib.import_module(f"syncnorm.tools.cli.{words[0]}")
    for name, function in work.items():
        monkeypatch.setattr(module, name, function)
    monkeypatch.setattr(module, shown, lambda record: print("the result", flush=True))
    return words


@pytest.mark.skipif(not Path(FULL).exists(), reason="needs /dev/full")
class TestFullDisk:
    def test_the_result_is_printed_and_the_file_named(self, call, command):
        code, out, err = call(*command, "--json", FULL)
        assert (code, out) == (NOT_WRITTEN, "the result\n")
        name = " ".join(command)
        assert err == f"syncnorm {name}: cannot write {FULL}: No space left on device\n"

    @pytest.mark.slow
    def test_the_other_files_of_a_real_run_are_written(self, run, tmp_path):
        done = run(*COMPARE, "--json", FULL, "--html", "out.html")
        assert done.returncode == NOT_WRITTEN
        assert "Relative difference from single" in done.stdout.decode()
        assert done.stderr.decode().splitlines()[-1].endswith(f"cannot write {FULL}: No space left on device")
        assert "<html" in (tmp_path / "out.html").read_text(encoding="utf-8")

    def test_files_are_written_where_printing_fails(self, call, command, monkeypatch, tmp_path):
        with open(FULL, "w") as full:
            monkeypatch.setattr(sys, "stdout", full)
            code, _, err = call(*command, "--json", "out.json")
            sys.stdout.close()  # the command has replaced it
            with suppress(OSError):
                full.close()
        assert code == 1
        assert err == "syncnorm: [Errno 28] No space left on device\n"
        assert json.loads((tmp_path / "out.json").read_text())


def test_a_report_that_cannot_be_drawn_costs_neither_the_result_nor_the_json(call, monkeypatch, tmp_path):
    def fail(*arguments):
        raise ValueError("no such\ncolor")

    compare = importlib.import_module("syncnorm.tools.cli.compare")
    monkeypatch.setattr(compare, "sweep", lambda *arguments, **named: iter([records.comparison()]))
    monkeypatch.setattr(compare, "write_html", fail)
    code, out, err = call("compare", "--html", "out.html", "--json", "out.json")
    assert code == NOT_WRITTEN
    assert "Local BN is" in out
    assert err.startswith("syncnorm compare: cannot write out.html: ValueError: no such color")
    assert err.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["out.json"]


def test_a_pipe_gets_one_document(call, monkeypatch, tmp_path):
    compare = importlib.import_module("syncnorm.tools.cli.compare")
    monkeypatch.setattr(compare, "sweep", lambda *arguments, **named: iter([records.comparison()] * 2))
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()), daemon=True)
    reader.start()
    assert call("compare", "--batch-per-rank", "2,4", "--json", str(pipe))[0] == 0
    reader.join(10)
    assert len(json.loads(read[0])["comparisons"]) == 2


def test_overhead_has_no_json(call):
    code, _, err = call("diagnose", "--overhead", "1", "--json", "out.json")
    assert (code, "leave one out" in err) == (2, True)


class TestTextIsLiteral:
    @pytest.mark.slow
    def test_a_real_run_on_a_narrow_console(self, run, tmp_path):
        done = run(*COMPARE, "--html", "out.html", PYTHONIOENCODING="latin-1")
        assert done.returncode == 0, done.stderr
        assert NAME.replace("\u5c42", "?") in done.stdout.decode("latin-1")
        assert (tmp_path / "out.html").exists()

    @pytest.mark.slow
    def test_steps_that_a_rank_prints(self, run):
        asked = ("--model", "nets:build", "--data", "nets:data", "--steps", "2", "--every", "2")
        done = run("diagnose", *asked, PYTHONIOENCODING="ascii")
        assert done.returncode == 0, done.stderr
        assert done.stdout.decode("ascii").count("[b]?$x_{$?") >= 2

    def test_errors(self, run):
        done = run("compare", "--model", f"{NAME}:build", PYTHONIOENCODING="ascii")
        assert (done.returncode, done.stderr.count(b"\n")) == (2, 1)
        assert b"--model '[b]\\u5c42$x_{$\\xe9:build'" in done.stderr

    def test_a_table_shows_markup_and_emoji_codes_literally(self):
        names = ["[b]title", "[/b]head", "[red]cell", ":smile:"]
        table = PlainTable(names[0])
        table.add_column(names[1])
        for name in names[2:]:
            table.add_row(name)
        console = Console(file=StringIO(), width=40)
        console.print(table)
        assert [line.strip() for line in console.file.getvalue().splitlines()] == names

    def test_a_dollar_in_a_figure_does_not_start_a_formula(self):
        with png(BytesIO(), (3, 3)) as figure:
            figure.suptitle("$x_{$ \u5c42")


@pytest.mark.slow
def test_what_was_compared_before_a_rank_was_killed(run, tmp_path):
    done = run(
        *COMPARE, "--loss", "nets:deadly", "--batch-per-rank", "2,4", "--json", "out.json", "--html", "out.html"
    )
    assert done.returncode == 1
    assert "2 ranks x 2 samples" in done.stdout.decode()
    assert b"rank 1 (world size 2) failed first: was ended by SIGKILL" in done.stderr
    assert _sizes(tmp_path / "out.json") == [2]
    assert (tmp_path / "out.html").exists()


def test_what_was_compared_before_it_was_interrupted(call, monkeypatch, tmp_path):
    def interrupted(*arguments, **named):
        yield records.comparison()
        assert _sizes(tmp_path / "out.json") == [4]  # at once, because it may be killed later
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib.import_module("syncnorm.tools.cli.compare"), "sweep", interrupted)
    code, out, _ = call("compare", "--batch-per-rank", "4,8", "--json", "out.json")
    assert (code, out.count("Local BN is")) == (130, 1)
    assert _sizes(tmp_path / "out.json") == [4]


def _sizes(file):
    return [each["settings"]["batch_per_rank"] for each in json.loads(file.read_text())["comparisons"]]


@pytest.mark.slow
def test_rows_that_were_measured_before_a_rank_was_killed(call, monkeypatch, tmp_path):
    monkeypatch.setattr(bench_runner, "measure_on_rank", _rank_killed_in_the_second_row)
    given = ("layer", "--quick", "--device", "cpu", "--dtypes", "fp32", "--shapes", "2,3;2,4")
    code, out, err = call("bench", *given, "--json", "out.json", "--csv", "out.csv")
    assert code == 1
    assert "rank 1 (world size 2) failed first: was ended by SIGKILL" in err
    assert "2x3" in out
    assert "Summary" not in out  # it would cover all rows
    assert [row["shape"] for row in json.loads((tmp_path / "out.json").read_text())["rows"]] == [[2, 3]]
    assert "2x3" in (tmp_path / "out.csv").read_text()


BENCH_RANK, MEASURE_ROW = bench_runner.measure_on_rank, bench_runner.measure_row


def _rank_killed_in_the_second_row(*arguments):
    bench_runner.measure_row = _deadly_row
    try:
        return BENCH_RANK(*arguments)
    finally:
        bench_runner.measure_row = MEASURE_ROW


def _deadly_row(shape, *how):
    if shape == (2, 4) and dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return MEASURE_ROW(shape, *how)


@pytest.mark.slow
def test_runs_of_a_study_that_were_done_before_a_rank_was_killed(call, monkeypatch, tmp_path):
    monkeypatch.setattr(study_runner, "answer_on_rank", _rank_killed_in_the_second_run)
    code, out, err = call("study", "fold", "--quick", "--json", "out.json", "--markdown", "out.md")
    assert code == 1
    assert "rank 1 (world size 2) failed first: was ended by SIGKILL" in err
    assert "50.0 ± 0.0" in out
    study = json.loads((tmp_path / "out.json").read_text())
    assert [row["condition"] for row in study["rows"]] == [{"norm": "BN", "lr": 1}]
    assert study["findings"] == []
    assert "50.0" in (tmp_path / "out.md").read_text(encoding="utf-8")


STUDY_RANK, FOLD = study_runner.answer_on_rank, study_runner.STUDIES["fold"]


def _rank_killed_in_the_second_run(*arguments):
    study_runner.STUDIES["fold"] = replace(
        FOLD, run=_deadly_study, views=lambda rows: [View("by rate", "accuracy", "norm", "lr", {})]
    )
    try:
        return STUDY_RANK(*arguments)
    finally:
        study_runner.STUDIES["fold"] = FOLD


def _deadly_study(settings, ranks, tell):
    def work(lr, ranks, together):
        if lr == 2 and ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        ranks.wait()
        return [StudyRow({"norm": "BN", "lr": lr}, 0, "accuracy", 0.5)]

    return Outcome(run_trials(Trials([1, 2]), work, ranks, tell), {})
