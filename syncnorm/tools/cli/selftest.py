"""``syncnorm selftest``."""

from __future__ import annotations

from pathlib import Path

import click

from syncnorm.tools.cli.options import json_option, ranks_option
from syncnorm.tools.cli.results import Results
from syncnorm.tools.common.launcher import wait_for_main_rank
from syncnorm.tools.common.records import write_json
from syncnorm.tools.report.progress import counted_on_stderr
from syncnorm.tools.report.selftest import print_selftest
from syncnorm.tools.selftest.runner import selftest as run_selftest


@click.command(short_help="Checks the layer on this machine.")
@ranks_option
@click.option("--cpu", is_flag=True, help="Under a launcher, use gloo on the CPU even if there are GPUs.")
@json_option
def selftest(ranks: int | None, cpu: bool, json_file: Path | None) -> int:
    """Run the layer on this machine's ranks, case by case, and compare with fp64 on the whole batch.

    Without a launcher it starts gloo ranks on the CPU. Under a launcher it uses the launcher's ranks, devices and
    backend:

    torchrun --nproc-per-node 2 -m syncnorm selftest

    The exit code is 0 if every case that this machine can run has passed, 3 if so but FILE could not be written, and
    1 otherwise.
    """
    with Results(print_selftest, (json_file, write_json)) as results:
        record = run_selftest(ranks, cpu, counted_on_stderr)
        results.keep(record)
    if record.passed:
        return results.exit_code
    wait_for_main_rank()
    return 1
