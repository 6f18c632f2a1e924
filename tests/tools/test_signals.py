"""SIGTERM and SIGHUP end a command together with its ranks and temporary folders."""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
from user_module import NETS, user_environ

from syncnorm.tools.cli.signals import SignalExit, signals_as_exceptions


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_ranks_end_and_folders_are_removed(tmp_path, name):
    (tmp_path / "nets.py").write_text(NETS, encoding="utf-8")
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    given = ("--model", "nets:build", "--data", "nets:data", "--steps", "1000000", "--every", "1")
    process = subprocess.Popen(
        [sys.executable, "-m", "syncnorm", "diagnose", *given],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
        env=user_environ(TMPDIR=str(temporary)),
        start_new_session=True,
        # A test run under nohup ignores SIGHUP, and its children would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )
    with process:
        assert process.stdout.readline().startswith(b"step 1: ")
        assert list(temporary.glob("syncnorm-*"))
        os.killpg(process.pid, getattr(signal, name))  # as by a terminal that is closed, or by `timeout`
        _, err = process.communicate(timeout=30)
    assert process.returncode == 128 + getattr(signal, name)
    assert err.decode().splitlines()[-1] == f"syncnorm: ended by {name}"
    assert list(temporary.glob("syncnorm-*")) == []
    assert _gone(process.pid)


def test_a_second_signal_does_not_interrupt_the_cleanup():
    with _signals_restored(), pytest.raises(SignalExit) as ended:
        _clean_up()
    assert ended.value.code == 128 + signal.SIGTERM


def test_an_ignored_signal_stays_ignored():
    with _signals_restored():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with signals_as_exceptions():
            os.kill(os.getpid(), signal.SIGHUP)


def test_a_launcher_ends_its_ranks_at_once(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with signals_as_exceptions():
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def _clean_up():
    with signals_as_exceptions():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def _signals_restored():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _gone(group):
    """Whether the processes of ``group`` end within a few seconds."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False
