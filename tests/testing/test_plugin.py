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


def test_loading_the_plugin_imports_no_more_than_syncnorm():
    code = (
        "import sys, pytest, syncnorm; before = set(sys.modules)\n"
        "import syncnorm.testing.plugin\n"
        "print(sorted(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(["syncnorm.testing", "syncnorm.testing.plugin"])
