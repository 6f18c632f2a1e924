"""Runs tests of the kernels in a process that selects Triton's interpreter before Triton is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from versions import why_no_triton

FILES = "layer/interpreted/test_passes.py", "layer/interpreted/test_sums.py", "layer/interpreted/test_two_ranks.py"


@pytest.mark.slow
@pytest.mark.timeout(550)
@pytest.mark.skipif(why_no_triton() is not None, reason=str(why_no_triton()))
@pytest.mark.parametrize(
    ("file", "forward"),
    [*((file, "auto") for file in FILES), (FILES[2], "sum"), ("gpu/test_device_step.py", "auto")],
)
def test_the_kernels_under_tritons_interpreter(file, forward):
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/{file}"],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": "", "SYNCNORM_FORWARD": forward},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert found.returncode == 0, found.stdout + found.stderr
