import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from syncnorm.__main__ import main
from syncnorm.tools.common.records import read_json
from syncnorm.tools.compare import Comparison

ROOT = Path(__file__).parents[2]
SHORT = ["--steps", "2", "--parity-steps", "1"]


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs the command line in this process and returns (exit code, stdout, stderr)."""

    def call_main(*arguments):
        monkeypatch.setattr(sys, "argv", ["syncnorm", *arguments])
        code = main()
        return code, *capsys.readouterr()

    return call_main


@pytest.fixture
def nets(tmp_path, monkeypatch):
    """The current directory, with the user's module, which is unloaded afterwards."""
    for name, text in (("nets", NETS), ("needy", "import not_installed_anywhere"), ("bad", "1 / 0")):
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [each for each in sys.path if each])
    yield tmp_path
    sys.modules.pop("nets", None)


def _start(*command, stdout=subprocess.PIPE):
    environ = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environ |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command], stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=100, env=environ
    )


def _torchrun(*arguments):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    return _start(*launcher, "-m", "syncnorm", *arguments)


NETS = """
import torch
from torch import nn
from torch.utils.data import IterableDataset, Subset, TensorDataset

number = 3


def build():
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(True), nn.Dropout(0.5),
                         nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 4, 3))


def datasets():
    x = torch.randn(48, 1, 6, 6)
    data = TensorDataset(x, (x.mean((1, 2, 3)) > 0).long())
    return Subset(data, range(32)), Subset(data, range(32, 48))


def summed(output, target):
    return nn.functional.cross_entropy(output, target, reduction="sum")


def broken():
    raise KeyError("weights")


def plain():
    return nn.Linear(3, 3)


def nothing():
    return None


def triple():
    return datasets() * 2


def iterable():
    return type("Stream", (IterableDataset,), {"__iter__": None})(), datasets()[1]


def empty():
    return datasets()[0], []


def bare():
    return [torch.zeros(1, 6, 6)] * 32, datasets()[1]


def texts():
    return [("a", 0)] * 32, [("a", 0)]


def other_size():
    return [(torch.zeros(2, 6, 6), 0)] * 32, [(torch.zeros(2, 6, 6), 0)] * 4


def floats():
    return [(torch.zeros(1, 6, 6), 0.5)] * 32, [(torch.zeros(1, 6, 6), 0.5)] * 4


def each(output, target):
    return target
"""
BAD = [
    (["--model", "nets"], "--model 'nets': expected package.module:function, for example --model nets:build"),
    (["--model", "netz:build"], "--model netz:build: no module named netz: did you mean nets?"),
    (["--model", "nets.deep:build"], "--model nets.deep:build: no module named nets.deep"),
    (["--model", "needy:build"], "--model needy:build: needy needs the module not_installed_anywhere"),
    (["--model", "bad:build"], "--model bad:build: importing bad raised ZeroDivisionError: division by zero"),
    (["--model", "nets:biuld"], "--model nets:biuld: nets has no 'biuld': did you mean build?"),
    (["--model", "nets:torhc"], "--model nets:torhc: nets has no 'torhc'\n"),  # not: torch, which it imports
    (["--loss", "nets:number"], "--loss nets:number: expected a function, got an int"),
    (["--model", "nets:broken"], "nets:broken() raised KeyError: 'weights'"),
    (["--model", "nets:nothing"], "nets:nothing() must return a torch.nn.Module, got None"),
    (["--model", "nets:plain"], "nets:plain() returns a Linear without batch norm layers"),
    (["--data", "nets:broken"], "nets:broken() raised KeyError: 'weights'"),
    (["--data", "nets:nothing"], "nets:nothing() must return two datasets, (training, test), got None"),
    (["--data", "nets:triple"], "nets:triple() must return two datasets, (training, test), got 4 values"),
    (["--data", "nets:iterable"], "the training data of nets:iterable is not map-style"),
    (["--data", "nets:empty"], "the test data of nets:empty is empty"),
    (["--data", "nets:bare"], "the training data of nets:bare: items must be (input, target), got Tensor"),
    (["--data", "nets:texts"], "the training data of nets:texts: the input of an item must be a tensor, got str"),
    (
        ["--model", "nets:build", "--data", "nets:other_size"],
        "the model raised on inputs of shape (2, 2, 6, 6):",
    ),
    (
        ["--model", "nets:build", "--data", "nets:floats"],
        "cross-entropy needs targets that are int64 class indices, got",
    ),
    (["--model", "nets:build", "--data", "nets:datasets", "--loss", "nets:each"], "nets:each must return a scalar"),
    (
        ["--data", "nets:datasets", "--batch-per-rank", "17"],
        "2 ranks with 17 samples each make a global batch of 34, more than the 32 training samples of nets:datasets",
    ),
    (["--arms", "ddp+snycbn"], "no arm is called 'ddp+snycbn': did you mean ddp+syncbn? the arms are single, dp,"),
    (["--arms", "zzz"], "no arm is called 'zzz': the arms are single, dp, ddp,"),
    (["--steps", "0"], "steps must be at least 1, got 0"),
    (["--steps", "many"], "Invalid value for '--steps': 'many' is not a valid integer"),
    (["--batch-per-rank", "4,0"], "batch_per_rank must be at least 1, got 0"),
    (["--batch-per-rank", "4,5000"], "a global batch of 10000, more than the 1347 training samples"),
    (["--batch-per-rank", "5000"], "a global batch of 10000, more than the 1347 training samples"),
    (["--ranks", "-2"], "compare needs at least 2 ranks, got -2"),
    (["--json", "/no/such/folder/x.json"], "cannot write /no/such/folder/x.json: No such file or directory"),
    (["--json", ""], "cannot write .: Is a directory"),
    (["--seed", str(2**64)], f"seed must be less than 2**62, got {2**64}"),
    (["--frobnicate"], "No such option"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_arguments_print_one_line_and_exit_with_2(call, nets, arguments, message):
    code, out, err = call("compare", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("syncnorm compare: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_arguments_under_a_launcher_are_reported_by_rank_0_first(call, nets, monkeypatch, arguments, message):
    launched(monkeypatch, RANK="1", LOCAL_RANK="1", WORLD_SIZE="2")
    pauses = []
    monkeypatch.setattr("time.sleep", pauses.append)  # so that rank 0 reports before the launcher ends it
    code, out, err = call("compare", *arguments)
    assert len(pauses) == 1
    assert (code, out) == (2, "")
    assert err.startswith("rank 1: syncnorm compare: ")
    assert message in err or ("--ranks" in arguments and "the launcher started 2: leave the number out" in err)


def launched(monkeypatch, **environ):
    for name, value in {"MASTER_ADDR": "localhost", "MASTER_PORT": "1", **environ}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RANK": "0", "WORLD_SIZE": "x"}, "RANK='0' and WORLD_SIZE='x' must be numbers"),
        (
            {"RANK": "0", "WORLD_SIZE": "2"},
            "WORLD_SIZE=2 are set, but MASTER_ADDR and MASTER_PORT are not",
        ),
    ],
)
def test_incomplete_environment_of_a_launcher(call, monkeypatch, environ, message):
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    code, out, err = call("compare")
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_the_json_is_written_although_stdout_fails(tmp_path):
    file = tmp_path / "out.json"
    with open("/dev/full", "w") as full:
        done = _start("-m", "syncnorm", "compare", "--arms", "ddp", *SHORT, "--json", str(file), stdout=full)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "syncnorm: [Errno 28] No space left on device"
    assert "Traceback" not in done.stderr
    assert json.loads(file.read_text())["arms"]


def test_a_launcher_that_started_one_rank_is_an_error_with_a_fix(call, monkeypatch):
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


def test_without_arguments_it_says_what_to_do_first(call):
    code, out, err = call()
    assert (code, err) == (0, "")
    first, _, rest = out.partition("Usage: ")
    commands = [line.split()[1] for line in first.splitlines() if line.startswith("  syncnorm ")]
    assert commands == ["selftest", "compare", "compare", "diagnose"]
    assert max(map(len, out.splitlines())) <= 80
    assert "Commands:" in rest
    assert 'eval "$(_SYNCNORM_COMPLETE=bash_source syncnorm)"' in out


COMPLETE = """
eval "$(_SYNCNORM_COMPLETE=bash_source syncnorm)"
complete -p syncnorm
for words in "se" "compare --batch"; do
    COMP_WORDS=(syncnorm $words) COMPREPLY=()
    COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
    _syncnorm_completion syncnorm
    echo "${COMPREPLY[@]}"
done
"""


@pytest.fixture
def script(tmp_path, monkeypatch):
    """The script ``syncnorm`` as it is installed, first on the PATH."""
    file = tmp_path / "bin/syncnorm"
    file.parent.mkdir()
    file.write_text(f"#!{sys.executable}\nimport sys\nfrom syncnorm.__main__ import main\nsys.exit(main())\n")
    file.chmod(0o755)
    monkeypatch.setenv("PATH", str(file.parent), prepend=os.pathsep)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return file


@pytest.mark.timeout(300)  # each completion imports torch
@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_completion_in_bash(script):
    done = subprocess.run(["bash", "--norc", "-c", COMPLETE], capture_output=True, text=True, timeout=250)
    assert done.stdout.splitlines() == [
        "complete -o nosort -F _syncnorm_completion syncnorm",
        "selftest",
        "--batch-per-rank",
    ], done.stderr


@pytest.mark.parametrize(("shell", "words"), [("zsh", "syncnorm se"), ("fish", "syncnorm se")])
def test_completion_in_other_shells(script, shell, words):
    def run(how, **variables):
        environ = os.environ | {"_SYNCNORM_COMPLETE": f"{shell}_{how}", **variables}
        done = subprocess.run([script], env=environ, capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert f"_SYNCNORM_COMPLETE={shell}_complete" in run("source")
    place = {"COMP_CWORD": "1" if shell == "zsh" else "se"}
    assert "selftest" in run("complete", COMP_WORDS=words, **place)


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


_HIDE_ACCELERATE = """
import runpy, sys
from syncnorm.testing import run_ranks

def _rank_hide():
    sys.modules["accelerate"] = None

if __name__ == "__main__":
    run_ranks(_rank_hide)  # in the ranks that the command uses
    runpy.run_module("syncnorm", run_name="__main__")
"""


@pytest.mark.slow
def test_an_extra_that_is_missing_on_the_ranks_is_named(tmp_path):
    (tmp_path / "hide.py").write_text(_HIDE_ACCELERATE)
    done = _start(str(tmp_path / "hide.py"), "compare", *SHORT)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1] == 'syncnorm: needs accelerate: pip install "syncnorm[cli]"'


@pytest.mark.slow
def test_without_a_launcher_it_starts_ranks_prints_a_table_and_writes_json(tmp_path):
    file = tmp_path / "result.json"
    done = _start("-m", "syncnorm", "compare", *SHORT, "--arms", "ddp+syncbn", "--json", str(file))
    assert (done.returncode, done.stderr.splitlines()[0][:20]) == (0, "1/6 single, seed 0: ")
    assert "yes (rounding)" in done.stdout
    assert "\x1b" not in done.stdout + done.stderr
    written = json.loads(file.read_text())
    assert (written["schema"], written["schema_version"]) == ("syncnorm.compare", 3)
    assert written["command"].startswith("syncnorm compare --steps 2")


USERS = ["compare", "--model", "nets:build", "--data", "nets:datasets", "--batch-per-rank", "4", *SHORT]


def _of_nets(file):
    comparison = read_json(Comparison, file)
    assert comparison.task.model == "nets:build"
    assert comparison.task.norm_layers == ("1", "5")
    assert (comparison.task.metric.name, comparison.task.num_train, comparison.task.num_test) == ("accuracy", 32, 16)
    return comparison


@pytest.mark.slow
def test_the_users_model_and_data_on_started_ranks(nets):
    done = _start(
        "-m", "syncnorm", *USERS, "--arms", "ddp,ddp+syncbn,ddp+group", "--seeds", "2", "--json", "out.json"
    )
    assert done.returncode == 0, done.stderr
    comparison = _of_nets(nets / "out.json")
    assert [run.seed for run in comparison["ddp"].seeds] == [0, 1]
    assert comparison.settings.num_groups == 2  # 6 and 4 channels
    synced = comparison["ddp+syncbn"].parity[0]
    assert synced.within_rounding  # though the model has dropout
    assert comparison["ddp"].parity[0].first_divergent_layer == "1"
    assert "Undecided whether SyncBN is needed." in done.stdout
    assert comparison.verdict[0] in " ".join(done.stdout.split())


@pytest.mark.slow
def test_the_users_model_and_loss_under_torchrun(nets):
    done = _torchrun(*USERS, "--loss", "nets:summed", "--arms", "ddp+syncbn", "--json", "out.json")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Relative difference from single") == 1
    assert "2 ranks x 4 samples" in done.stdout
    synced = _of_nets(nets / "out.json")["ddp+syncbn"].parity[0]
    assert synced.gradient_factor == pytest.approx(0.5, rel=1e-4)
    assert "the loss is a sum over samples" in synced.note


@pytest.mark.slow
def test_the_users_model_under_accelerate_launch(nets):
    launcher = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0")
    done = _start(*launcher, "-m", "syncnorm", *USERS, "--arms", "ddp+syncbn", "--json", "out.json")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Relative difference from single") == 1
    assert _of_nets(nets / "out.json")["ddp+syncbn"].parity[0].within_rounding


@pytest.mark.slow
def test_several_batch_sizes_under_torchrun(nets):
    given = ("compare", "--model", "nets:build", "--data", "nets:datasets", "--batch-per-rank", "2,4", *SHORT)
    done = _torchrun(*given, "--arms", "ddp", "--json", "out.json")
    assert done.returncode == 0, done.stderr
    sweep = json.loads((nets / "out.json").read_text())
    assert [each["settings"]["batch_per_rank"] for each in sweep["comparisons"]] == [2, 4]


@pytest.mark.slow
def test_under_torchrun_a_bad_argument_prints_one_line():
    done = _torchrun("compare", "--arms", "nonsense")
    assert done.returncode != 0
    assert done.stdout == ""
    assert done.stderr.count("no arm is called 'nonsense'") == 1
    assert "syncnorm/tools/cli" not in done.stderr  # torchrun prints a traceback of its own code


@pytest.mark.slow
def test_under_torchrun_a_rank_that_fails_alone_says_why(nets):
    (nets / "lame.py").write_text(
        "import os\nfrom nets import build\nif os.environ['RANK'] == '1':\n    raise OSError('no disk here')\n"
    )
    done = _torchrun("compare", "--model", "lame:build", "--data", "nets:datasets")
    assert done.returncode != 0
    assert done.stderr.count("no disk here") == 1
    assert "rank 1: syncnorm compare: --model lame:build: importing lame raised OSError: no disk here" in done.stderr
