"""``syncnorm selftest``."""

from __future__ import annotations

from pathlib import Path

import click

from syncnorm.cli.results import Results
from syncnorm.diagnostics.selftest import selftest as run_selftest
from syncnorm.launcher import let_rank_0_speak
from syncnorm.ranks import DEFAULT_RANKS
from syncnorm.report.progress import counted_on_stderr
from syncnorm.report.records_json import write_json
from syncnorm.report.selftest_terminal import print_selftest


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
    let_rank_0_speak()
    return 1
