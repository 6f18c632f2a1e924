import subprocess
import sys

import pytest

USES_PLUGIN = """
import os
import torch
import torch.distributed as dist

def rank_and_pid():
    return dist.get_rank(), os.getpid()

def test_ranks(run_ranks):
    first = run_ranks(rank_and_pid, world_size=2)
    assert [rank for rank, _ in first] == [0, 1]
    assert run_ranks(rank_and_pid, world_size=2) == first

def build():
    return torch.nn.BatchNorm1d(3, affine=False)

def test_model(assert_matches_single_process):
    assert_matches_single_process(build, torch.randn(5, 3))
"""


def plugin_arguments(pytestconfig):
    """How an inner pytest gets the plugin: by itself where syncnorm is installed."""
    loaded_by_entry_point = pytestconfig.pluginmanager.has_plugin("syncnorm")
    return [] if loaded_by_entry_point else ["-p", "syncnorm.testing.plugin"]


@pytest.mark.slow
@pytest.mark.parametrize(("import_mode", "folder"), [("prepend", "."), ("importlib", "tests/unit")])
def test_the_fixtures_run_functions_of_a_test_module(pytester, pytestconfig, import_mode, folder):
    path = pytester.path / folder / "test_uses_plugin.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(USES_PLUGIN)
    result = pytester.runpytest_subprocess(  # in this process pytester would unload torch's modules
        *plugin_arguments(pytestconfig),
        f"--import-mode={import_mode}",
        "-W",
        "error",
        "-p",
        "no:cacheprovider",
    )
    result.assert_outcomes(passed=2)


FAILS = """
import torch
from torch import nn

def build():
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))

def broken():
    raise ValueError("the user's mistake")

class Raises(nn.Module):
    def forward(self, x):
        return x + torch.zeros(2, 3, 5)

def test_parity(assert_matches_single_process):
    assert_matches_single_process(build, torch.randn(6, 4))

def test_a_rank_raises(run_ranks):
    run_ranks(broken)

def test_no_function_of_a_module(run_ranks):
    run_ranks(lambda: 1)

def test_bad_arguments(assert_matches_single_process):
    assert_matches_single_process(build, torch.randn(6, 4), splits=[1, 2, 3])

def test_the_model_raises_in_this_process(assert_matches_single_process):
    assert_matches_single_process(Raises, torch.randn(6, 4))
"""


@pytest.mark.slow
def test_a_failure_shows_the_users_line_and_the_ranks_traceback_without_our_frames(pytester, pytestconfig):
    pytester.makepyfile(test_fails=FAILS)
    done = pytester.runpytest_subprocess(*plugin_arguments(pytestconfig), "-p", "no:cacheprovider")
    done.assert_outcomes(failed=5)
    text = done.stdout.str()
    assert "syncnorm/testing" not in text
    shown = [line.removeprefix(">").strip() for line in text.splitlines() if line.startswith(">")]
    assert shown == [
        "assert_matches_single_process(build, torch.randn(6, 4))",
        "run_ranks(broken)",
        "run_ranks(lambda: 1)",
        "assert_matches_single_process(build, torch.randn(6, 4), splits=[1, 2, 3])",
        "assert_matches_single_process(Raises, torch.randn(6, 4))",
        "return x + torch.zeros(2, 3, 5)",
    ]
    # Of the rank, in the message.
    done.stdout.fnmatch_lines(["E *RankError: rank ? (world size 2) failed first: ValueError: the user's mistake"])
    done.stdout.fnmatch_lines(['E *File "*/test_fails.py", line 8, in broken'])
    done.stdout.fnmatch_lines(["E *AssertionError: 2 ranks do not match a single process: step 0, rank 0: output *"])
    done.stdout.fnmatch_lines(["E *InputError: *it is a lambda: make it a function with a name*"])


def test_loading_the_plugin_imports_no_more_than_syncnorm():
    code = (
        "import sys, pytest, syncnorm; before = set(sys.modules)\n"
        "import syncnorm.testing.plugin\n"
        "print(sorted(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(["syncnorm.testing", "syncnorm.testing.plugin"])
