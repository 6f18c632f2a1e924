"""``syncnorm selftest``."""

from __future__ import annotations

from pathlib import Path

import click

from syncnorm.tools.cli.results import Results
from syncnorm.tools.common.launcher import wait_for_main_rank
from syncnorm.tools.common.ranks import DEFAULT_RANKS
from syncnorm.tools.common.records import write_json
from syncnorm.tools.report.progress import counted_on_stderr
from syncnorm.tools.report.selftest_terminal import print_selftest
from syncnorm.tools.selftest.runner import selftest as run_selftest


@click.command(short_help="Proves that this machine gets the layer right.")
@click.option(
    "--ranks", type=int, metavar="N", help=f"Ranks to start, {DEFAULT_RANKS} by default; not under a launcher."
)
@click.option("--cpu", is_flag=True, help="Under a launcher: gloo on the CPU, also where there are GPUs.")
@click.option(
    "--json",
    "json_file",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write the result to FILE as well.",
)
def selftest(ranks: int | None, cpu: bool, json_file: Path | None) -> int:
    """Run the layer on this machine's ranks, in every way that matters, against fp64 on the whole batch.

    Alone it starts gloo ranks on the CPU. Under a launcher it uses the ranks, devices and backend that it is given:

    torchrun --nproc-per-node 2 -m syncnorm selftest

    Exit code 0 if every case passed that this machine can run, 3 if so and FILE could not be written, else 1.
    """
    with Results(print_selftest, (json_file, write_json)) as results:
        record = run_selftest(ranks, cpu, counted_on_stderr)
        results.keep(record)
    if record.passed:
        return results.exit_code
    wait_for_main_rank()
    return 1
