"""What a command has found is shown and written, whatever fails afterwards."""

import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import replace
from io import BytesIO, StringIO
from pathlib import Path

import pytest
import records
import torch.distributed as dist
from rich.console import Console

import syncnorm.tools.bench.runner as bench_runner
import syncnorm.tools.bench.session as bench_session
import syncnorm.tools.study.runner as study_runner
from syncnorm.__main__ import main
from syncnorm.monitor.findings import Findings
from syncnorm.tools.cli.results import NOT_WRITTEN
from syncnorm.tools.cli.signals import Ended, raised_as_exceptions
from syncnorm.tools.common.files import write_file
from syncnorm.tools.report.consoles import PlainTable
from syncnorm.tools.report.figures import png
from syncnorm.tools.study.question import Outcome
from syncnorm.tools.study.records import Row, View
from syncnorm.tools.study.trials import Trials, run_trials

ROOT = Path(__file__).parents[2]
FULL = "/dev/full"
NETS = """
import os, signal, torch
from torch import nn
from torch.utils.data import TensorDataset


def build():
    parts = {"conv": nn.Conv2d(1, 8, 3), "[b]\u5c42$x_{$\u00e9": nn.BatchNorm2d(8), "pool": nn.AdaptiveAvgPool2d(1)}
    net = nn.Sequential()
    for name, part in (parts | {"flat": nn.Flatten(), "head": nn.Linear(8, 2)}).items():
        net.add_module(name, part)
    return net


def data():
    x = torch.randn(48, 1, 6, 6)
    data = TensorDataset(x, (x.mean((1, 2, 3)) > 0).long())
    return data, data


def deadly(output, target):
    if len(output) == 4 and os.environ.get("RANK") == "1" and torch.distributed.is_initialized():
        os.kill(os.getpid(), signal.SIGKILL)
    return nn.functional.cross_entropy(output, target)
"""
NAME = "[b]\u5c42$x_{$\u00e9"
COMPARE = ("compare", "--model", "nets:build", "--data", "nets:data", "--arms", "ddp", "--steps", "2")


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """The command line in this process, in a folder of its own: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call_main(*arguments):
        monkeypatch.setattr(sys, "argv", ["syncnorm", *arguments])
        return main(), *capsys.readouterr()

    return call_main


@pytest.fixture
def run(tmp_path):
    """The command line as the user's own process, in a folder with the user's module."""
    (tmp_path / "nets.py").write_text(NETS, encoding="utf-8")

    def run_command(*arguments, **environ):
        command = [sys.executable, "-m", "syncnorm", *arguments]
        return subprocess.run(command, capture_output=True, timeout=100, cwd=tmp_path, env=_environ(**environ))

    return run_command


def _environ(**more):
    environ = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return {**environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


class Record:
    """Of any command."""

    passed = True

    def to_dict(self):
        return {"found": 1}


FINDINGS = Findings(2, 4, 2, (1.0, 1.0), None, None, None, None, ())
COMMANDS = [
    (("compare",), {"sweep": lambda *arguments, **named: iter([Record()])}, "print_comparison"),
    (("bench",), {"run": lambda *arguments, **named: Record()}, "print_benchmark"),
    (("study", "fold"), {"run": lambda *arguments, **named: Record()}, "print_study"),
    (("selftest",), {"run_selftest": lambda *arguments: Record()}, "print_selftest"),
    (("diagnose",), {"run_diagnose": lambda *arguments: FINDINGS}, "say"),
]


@pytest.fixture(params=COMMANDS, ids=lambda each: each[0][0])
def command(request, monkeypatch):
    """Words of a command that has its result at once."""
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
        assert "Difference to single" in done.stdout.decode()
        assert done.stderr.decode().splitlines()[-1].endswith(f"cannot write {FULL}: No space left on device")
        assert "<html" in (tmp_path / "out.html").read_text(encoding="utf-8")

    def test_files_are_written_where_printing_fails(self, call, command, monkeypatch, tmp_path):
        with open(FULL, "w") as full:
            monkeypatch.setattr(sys, "stdout", full)
            code, _, err = call(*command, "--json", "out.json")
            sys.stdout.close()  # which is another by now
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
    assert "Verdict" in out
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


class TestFiles:
    def test_a_write_that_fails_half_way_leaves_what_was_there(self, tmp_path):
        file = tmp_path / "out.json"
        file.write_text("of last week")
        with _files_of_at_most(1000), pytest.raises(OSError, match="File too large"):
            write_file(file, b"x" * 5000)
        assert file.read_text() == "of last week"
        assert list(tmp_path.iterdir()) == [file]

    def test_a_link_and_the_mode_stay(self, tmp_path):
        file, link = tmp_path / "out.json", tmp_path / "link"
        file.write_text("old")
        file.chmod(0o640)
        link.symlink_to(file)
        write_file(link, b"new")
        assert link.is_symlink()
        assert (file.read_text(), file.stat().st_mode & 0o777) == ("new", 0o640)

    def test_stdout_that_is_a_file_keeps_what_was_printed(self, tmp_path):
        with (tmp_path / "stdout").open("w") as stdout:
            print("printed", file=stdout, flush=True)
            write_file(Path(f"/proc/self/fd/{stdout.fileno()}"), b"written")
        assert (tmp_path / "stdout").read_text() == "printed\nwritten"


@contextmanager
def _files_of_at_most(num_bytes):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class TestNames:
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

    def test_a_table_shows_them_as_they_are_on_any_console(self):
        names = ["[b]title", "[/b]head", "[red]cell", ":smile:"]
        table = PlainTable(names[0])
        table.add_column(names[1])
        for name in names[2:]:
            table.add_row(name)
        console = Console(file=StringIO(), width=40)
        console.print(table)
        assert [line.strip() for line in console.file.getvalue().splitlines()] == names

    def test_a_picture_takes_no_dollar_for_mathematics(self):
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
        assert _sizes(tmp_path / "out.json") == [4]  # at once: nothing may be able to write later
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib.import_module("syncnorm.tools.cli.compare"), "sweep", interrupted)
    code, out, _ = call("compare", "--batch-per-rank", "4,8", "--json", "out.json")
    assert (code, out.count("Verdict")) == (130, 1)
    assert _sizes(tmp_path / "out.json") == [4]


def _sizes(file):
    return [each["settings"]["batch_per_rank"] for each in json.loads(file.read_text())["comparisons"]]


@pytest.mark.slow
def test_rows_that_were_measured_before_a_rank_was_killed(call, monkeypatch, tmp_path):
    monkeypatch.setattr(bench_runner, "measure_on_rank", killed_in_the_second_row)
    given = ("--what", "layer", "--quick", "--device", "cpu", "--dtypes", "fp32", "--shapes", "2,3;2,4")
    code, out, err = call("bench", *given, "--json", "out.json", "--csv", "out.csv")
    assert code == 1
    assert "rank 1 (world size 2) failed first: was ended by SIGKILL" in err
    assert "2x3" in out
    assert "Summary" not in out  # it would be of all rows
    assert [row["shape"] for row in json.loads((tmp_path / "out.json").read_text())["rows"]] == [[2, 3]]
    assert "2x3" in (tmp_path / "out.csv").read_text()


BENCH_RANK, MEASURE_ROW = bench_runner.measure_on_rank, bench_session.measure_row


def killed_in_the_second_row(*arguments):
    bench_session.measure_row = _deadly_row
    try:
        return BENCH_RANK(*arguments)
    finally:
        bench_session.measure_row = MEASURE_ROW


def _deadly_row(shape, *how):
    if shape == (2, 4) and dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return MEASURE_ROW(shape, *how)


@pytest.mark.slow
def test_runs_of_a_study_that_were_done_before_a_rank_was_killed(call, monkeypatch, tmp_path):
    monkeypatch.setattr(study_runner, "answer_on_rank", killed_in_the_second_run)
    code, out, err = call("study", "fold", "--quick", "--json", "out.json", "--markdown", "out.md")
    assert code == 1
    assert "rank 1 (world size 2) failed first: was ended by SIGKILL" in err
    assert "50.0 ± 0.0" in out
    study = json.loads((tmp_path / "out.json").read_text())
    assert [row["condition"] for row in study["rows"]] == [{"norm": "BN", "lr": 1}]
    assert study["findings"] == []
    assert "50.0" in (tmp_path / "out.md").read_text(encoding="utf-8")


STUDY_RANK, FOLD = study_runner.answer_on_rank, study_runner.STUDIES["fold"]


def killed_in_the_second_run(*arguments):
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
        return [Row({"norm": "BN", "lr": lr}, 0, "accuracy", 0.5)]

    return Outcome(run_trials(Trials([1, 2]), work, ranks, lambda lr: tell(str(lr))), {})


class TestSignals:
    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
    def test_ranks_and_folders_go(self, tmp_path, name):
        (tmp_path / "nets.py").write_text(NETS, encoding="utf-8")
        temporary = tmp_path / "tmp"
        temporary.mkdir()
        given = ("--model", "nets:build", "--data", "nets:data", "--steps", "1000000", "--every", "1")
        process = subprocess.Popen(
            [sys.executable, "-m", "syncnorm", "diagnose", *given],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=tmp_path,
            env=_environ(TMPDIR=str(temporary)),
            start_new_session=True,
        )
        with process:
            assert process.stdout.readline().startswith(b"step 1: ")
            assert list(temporary.glob("syncnorm-*"))
            os.killpg(process.pid, getattr(signal, name))  # as a terminal that is closed does, and timeout
            _, err = process.communicate(timeout=30)
        assert process.returncode == 128 + getattr(signal, name)
        assert err.decode().splitlines()[-1] == f"syncnorm: ended by {name}"
        assert list(temporary.glob("syncnorm-*")) == []
        assert _gone(process.pid)

    def test_a_second_signal_does_not_end_the_cleaning_up(self):
        with _signals_put_back(), pytest.raises(Ended) as ended:
            _cleaning_up()
        assert ended.value.code == 128 + signal.SIGTERM

    def test_nohup_holds(self):
        with _signals_put_back():
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
            with raised_as_exceptions():
                os.kill(os.getpid(), signal.SIGHUP)

    def test_a_launcher_ends_its_ranks_at_once(self, monkeypatch):
        monkeypatch.setenv("RANK", "0")
        with raised_as_exceptions():
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def _cleaning_up():
    with raised_as_exceptions():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def _signals_put_back():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _gone(group):
    """Whether the processes of ``group`` are, within a second or so."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False
