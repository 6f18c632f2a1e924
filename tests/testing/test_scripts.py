"""What a script gets that ranks cannot import: one line that says so, nothing that hangs, no process left behind."""

import os
import re
import subprocess
import sys
import time

import pytest

HEAD = """
import os
import torch
from torch import nn
import syncnorm

with open(os.environ["IMPORTS"], "a+") as file:
    file.write(f"{os.getpid()}\\n")
    file.seek(0)
    if len(file.readlines()) > 20:  # ranks that start ranks
        os._exit(1)

def build():
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))

def data():
    dataset = torch.utils.data.TensorDataset(torch.randn(16, 4), torch.zeros(16, dtype=torch.long))
    return dataset, dataset

"""
CALLS = {
    "run_ranks": "syncnorm.testing.run_ranks(build)",
    "assert_matches": "syncnorm.testing.assert_matches_single_process(build, torch.randn(6, 4))",
    "compare": 'syncnorm.compare.run(build, data, arms=["ddp"], steps=2)',
}
TORCHS_OWN = "ignore:Implicitly cleaning up:ResourceWarning"  # up to torch 2.8, of torch.distributed.nn.jit
GUARD = 'if __name__ == "__main__":\n    '


def run(*arguments, stdin=None, **environ):
    return subprocess.run(
        [sys.executable, "-W", "error", "-W", TORCHS_OWN, *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, **environ},
    )


def run_script(folder, text):
    """Its result, and the ids of all processes that have executed its top level."""
    script, imports = folder / "script.py", folder / "imports"
    script.write_text(HEAD + text)
    done = run(str(script), IMPORTS=str(imports))
    return done, [int(pid) for pid in imports.read_text().split()]


def last_line(done):
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stderr.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("call", CALLS)
def test_a_script_without_the_guard_gets_one_line(tmp_path, call):
    start = time.monotonic()
    done, pids = run_script(tmp_path, CALLS[call])
    assert time.monotonic() - start < 60  # some seconds on an idle machine; a rank that hangs is given 120 s
    assert last_line(done) == (
        f"syncnorm.errors.InputError: {tmp_path}/script.py starts ranks at its top level, and would do so again in "
        'each rank, which imports it: put the call under `if __name__ == "__main__":`'
    )
    assert done.stderr.count("Traceback") == 1  # the ranks end without one
    assert 2 <= len(pids) <= 3  # this process and two ranks, of which one may be ended before it gets that far
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.slow
def test_a_module_that_starts_ranks_when_it_is_imported_is_refused(tmp_path):
    (tmp_path / "nets.py").write_text(HEAD + CALLS["run_ranks"])
    done, pids = run_script(tmp_path, f"{GUARD}import nets")
    assert re.search(
        r"RankError: rank \d .*failed first: .*InputError: a module starts ranks at its top level", done.stderr
    )
    assert len(pids) == 1 + 3 + 2  # both files here, both in each rank


@pytest.mark.slow
@pytest.mark.parametrize("call", ["assert_matches", "compare"])
def test_with_the_guard_it_runs_after_import_syncnorm(tmp_path, call):
    done, pids = run_script(tmp_path, GUARD + CALLS[call])
    assert done.returncode == 0, done.stderr
    assert len(pids) == 3


@pytest.mark.slow
def test_a_function_under_the_guard_is_not_found(tmp_path):
    done, _ = run_script(tmp_path, GUARD + "def hidden(): pass\n    syncnorm.testing.run_ranks(hidden)")
    assert done.returncode == 1
    assert re.search(
        r"RankError: rank \d .*failed first: .*InputError: the ranks cannot import .*'hidden'.*at the top level of "
        r'its file and not under `if __name__ == "__main__":`',
        done.stderr,
    )


@pytest.mark.slow
def test_a_script_that_fails_in_the_ranks_alone_is_named(tmp_path):
    text = f"if __name__ != '__main__': raise OSError('only here')\n{GUARD}{CALLS['run_ranks']}"
    done, _ = run_script(tmp_path, text)
    assert "OSError: only here" in done.stderr
    assert last_line(done).endswith(f"it died while it imported {tmp_path}/script.py, see its output above")


@pytest.mark.parametrize("build", ["lambda: build()", "functools.partial(lambda: build())", "make()"])
def test_lambdas_and_local_functions_are_named_with_their_line(tmp_path, build):
    text = f"""import functools
def make():
    def local():
        return build()
    return local
{GUARD}syncnorm.compare.run({build}, data, arms=["ddp"], steps=2)
"""
    done, pids = run_script(tmp_path, text)
    name, kind = ("make.<locals>.local", "defined inside another") if build == "make()" else ("<lambda>", "a lambda")
    assert last_line(done).startswith(
        f"syncnorm.errors.InputError: the ranks are other processes, which must be able to import {name} "
        f"({tmp_path}/script.py:"
    )
    assert kind in last_line(done)
    assert len(pids) == 1


def test_functions_of_the_command_line_and_of_standard_input_are_refused():
    code = "from syncnorm.testing import run_ranks\ndef f(): pass\nrun_ranks(f)"
    for done in (run("-c", code), run(stdin=code)):
        assert "InputError" in last_line(done)
        assert "able to import f (<st" in last_line(done)
        assert "put it in a file and import it from there" in last_line(done)


def test_standard_input_cannot_start_ranks_even_for_a_function_of_a_module():
    code = "import torch.distributed as dist, syncnorm\nsyncnorm.testing.run_ranks(dist.get_rank)"
    assert last_line(run(stdin=code)).endswith("<stdin> is no file: save it as one")
