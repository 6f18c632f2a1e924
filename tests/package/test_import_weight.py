"""``import syncnorm`` loads no heavy module and takes little more time than ``import torch``."""

import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import syncnorm

PACKAGE = Path(syncnorm.__file__).parent


def test_import_loads_no_plotting_command_line_or_accelerate():
    heavy = ["matplotlib", "click", "rich", "sklearn", "accelerate", "jinja2", "pytest", "torch._dynamo"]
    heavy += ["syncnorm.testing", "syncnorm.integrations", "lightning", "transformers", "tensorboard"]
    code = f"import sys, syncnorm; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    already = subprocess.run(
        [sys.executable, "-c", f"import sys, torch; print([m for m in {heavy} if m in sys.modules])"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert out.stdout == already.stdout


@pytest.mark.slow
def test_import_takes_at_most_a_fifth_longer_than_torchs():
    code = (
        "import time; start = time.perf_counter(); import torch; between = time.perf_counter(); import syncnorm; "
        "print((time.perf_counter() - start) / (between - start))"
    )
    ratios = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        for _ in range(3)
    ]
    assert statistics.median(ratios) < 1.2
