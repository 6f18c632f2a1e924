import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from syncnorm.__main__ import main

ROOT = Path(__file__).parent.parent
SHORT = ["--steps", "2", "--parity-steps", "1"]


@pytest.fixture
def call(monkeypatch, capsys):
    """The command line in this process: (exit code, stdout, stderr)."""

    def call_main(*arguments):
        monkeypatch.setattr(sys, "argv", ["syncnorm", *arguments])
        code = main()
        return code, *capsys.readouterr()

    return call_main


def _start(*command, stdout=subprocess.PIPE):
    environ = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environ |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command], stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=100, env=environ
    )


def _torchrun(*arguments):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    return _start(*launcher, "-m", "syncnorm", *arguments)


BAD = [
    (["--arms", "ddp+snycbn"], "no arm is called 'ddp+snycbn': did you mean ddp+syncbn? the arms are single, dp,"),
    (["--arms", "zzz"], "no arm is called 'zzz': the arms are single, dp, ddp,"),
    (["--steps", "0"], "steps must be at least 1, got 0"),
    (["--steps", "many"], "Invalid value for '--steps': 'many' is not a valid integer"),
    (["--batch-per-rank", "5000"], "a global batch of 10000, more than the 1347 training images"),
    (["--ranks", "-2"], "compare needs at least 2 ranks, got -2"),
    (["--json", "/no/such/folder/x.json"], "cannot write /no/such/folder/x.json: No such file or directory"),
    (["--json", ""], "cannot write .: Is a directory"),
    (["--seed", str(2**64)], f"seed must be less than 2**63, got {2**64}"),
    (["--frobnicate"], "No such option"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_arguments_cost_one_line_and_exit_2(call, arguments, message):
    code, out, err = call("compare", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("syncnorm compare: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_arguments_under_a_launcher_are_told_by_rank_0_alone(call, monkeypatch, arguments, message):
    launched(monkeypatch, RANK="1", LOCAL_RANK="1", WORLD_SIZE="2")
    pauses = []
    monkeypatch.setattr("time.sleep", pauses.append)  # so that rank 0 has spoken before the launcher ends it
    assert call("compare", *arguments) == (2, "", "")
    assert len(pauses) == 1


def launched(monkeypatch, **environ):
    for name, value in {"MASTER_ADDR": "localhost", "MASTER_PORT": "1", **environ}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RANK": "0", "WORLD_SIZE": "x"}, "RANK='0' and WORLD_SIZE='x' must be numbers"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "RANK=0 and WORLD_SIZE=2 are set, but MASTER_ADDR and MASTER_PORT not"),
    ],
)
def test_half_an_environment_of_a_launcher(call, monkeypatch, environ, message):
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    code, out, err = call("compare")
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_the_json_outlives_a_broken_stdout(tmp_path):
    file = tmp_path / "out.json"
    with open("/dev/full", "w") as full:
        done = _start("-m", "syncnorm", "compare", "--arms", "ddp", *SHORT, "--json", str(file), stdout=full)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "syncnorm: [Errno 28] No space left on device"
    assert "Traceback" not in done.stderr
    assert json.loads(file.read_text())["arms"]


def test_a_launcher_that_started_one_rank_is_told_what_to_do(call, monkeypatch):
    launched(monkeypatch, RANK="0", WORLD_SIZE="1")
    code, _, err = call("compare")
    assert code == 2
    assert (
        err == "syncnorm compare: compare needs at least 2 ranks, got 1: start it with torchrun --nproc-per-node 2\n"
    )


def test_ranks_that_contradict_the_launcher(call, monkeypatch):
    launched(monkeypatch, RANK="0", WORLD_SIZE="2")
    code, _, err = call("compare", "--ranks", "3")
    assert code == 2
    assert "asked for 3 ranks, but the launcher started 2" in err


def test_unknown_command(call):
    code, out, err = call("comapre")
    assert (code, out) == (2, "")
    assert err.startswith("syncnorm: No such command 'comapre'.")
    assert err.count("\n") == 1


def test_help_and_version(call):
    assert call("--version")[:2] == (0, "syncnorm, version 0.1.0\n")
    code, out, _ = call("compare", "--help")
    assert code == 0
    assert "--batch-per-rank" in out


_HIDE_EACH_EXTRA = """
import sys
from syncnorm.__main__ import main

for missing in ("click", "rich", "sklearn"):
    sys.modules[missing] = None
    print(main())
    del sys.modules[missing]
"""


def test_a_missing_extra_is_named():
    done = _start("-c", _HIDE_EACH_EXTRA, "compare", *SHORT)
    assert done.stdout.split() == ["2", "2", "2"]
    assert done.stderr.splitlines() == [
        f'syncnorm: needs {missing}: pip install "syncnorm[compare]"' for missing in ("click", "rich", "sklearn")
    ]


def test_alone_it_starts_ranks_prints_a_table_and_writes_json(tmp_path):
    file = tmp_path / "result.json"
    done = _start("-m", "syncnorm", "compare", *SHORT, "--arms", "ddp+syncbn", "--json", str(file))
    assert (done.returncode, done.stderr.splitlines()[0][:12]) == (0, "1/2 single: ")
    assert "yes (fp32 rounding)" in done.stdout
    assert "\x1b" not in done.stdout + done.stderr
    written = json.loads(file.read_text())
    assert (written["schema"], written["schema_version"]) == ("syncnorm.compare", 1)
    assert written["command"].startswith("syncnorm compare --steps 2")


def test_under_torchrun_it_uses_the_given_ranks_and_prints_once():
    done = _torchrun("compare", *SHORT, "--arms", "ddp+syncbn")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Difference to single") == 1
    assert "2 ranks x 4 images" in done.stdout
    assert "yes (fp32 rounding)" in done.stdout


def test_under_torchrun_a_bad_argument_is_one_line_of_ours():
    done = _torchrun("compare", "--arms", "nonsense")
    assert done.returncode != 0
    assert done.stdout == ""
    assert done.stderr.count("no arm is called 'nonsense'") == 1
    assert "syncnorm/cli" not in done.stderr  # the traceback that torchrun prints is its own
