"""``import syncnorm`` loads no heavy module and takes little more time than ``import torch``."""

import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from versions import one_graph

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


@one_graph  # before, every first forward imports it
def test_an_error_is_reported_to_other_ranks_without_importing_the_compiler():
    """It would take a second or more, for which they wait."""
    code = (
        "import sys; from unittest import mock; import torch; from syncnorm import comm, functional\n"
        "with mock.patch.object(comm, 'abort_peers_with') as report:\n"
        "    functional.abort_peers_with(ValueError(), object(), torch.device('cpu'))\n"
        "print(report.call_count, 'torch._dynamo' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    assert out.stdout == "1 False\n"


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
