"""``syncnorm compare``."""

from __future__ import annotations

from pathlib import Path

import click

from syncnorm.cli.files import check_writable
from syncnorm.compare import ARMS, run
from syncnorm.compare.ranks import DEFAULT_RANKS
from syncnorm.compare.runner import DEFAULT_BATCH_PER_RANK, DEFAULT_PARITY_STEPS, DEFAULT_STEPS
from syncnorm.errors import InputError
from syncnorm.launcher import speaks
from syncnorm.report.progress import progress_on_stderr
from syncnorm.report.records_json import write_json
from syncnorm.report.terminal import print_comparison


@click.command(short_help="DataParallel, DDP and synchronized batch norm side by side.")
@click.option(
    "--arms", metavar="A,B,...", help=f"Arms to run; single is always run. All by default: {', '.join(ARMS)}."
)
@click.option(
    "--ranks",
    type=int,
    metavar="N",
    help=f"Ranks to start, {DEFAULT_RANKS} by default; not under a launcher.",
)
@click.option(
    "--batch-per-rank",
    type=int,
    default=DEFAULT_BATCH_PER_RANK,
    show_default=True,
    metavar="N",
    help="Images that a rank sees a step.",
)
@click.option("--steps", type=int, default=DEFAULT_STEPS, show_default=True, metavar="N", help="Steps of each arm.")
@click.option(
    "--parity-steps",
    type=int,
    metavar="K",
    help=f"Measure parity after step 1 and after step K, {DEFAULT_PARITY_STEPS} by default.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the weights and of the order of the data.")
@click.option(
    "--json",
    "json_file",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write the result to FILE as well.",
)
def compare(
    arms: str | None,
    ranks: int | None,
    batch_per_rank: int,
    steps: int,
    parity_steps: int | None,
    seed: int,
    json_file: Path | None,
) -> None:
    """Train DataParallel, DDP and synchronized batch norm side by side on scikit-learn's digits.

    Alone it starts gloo ranks on this machine. Under a launcher it uses the ranks that it is given:

    torchrun --nproc-per-node 2 -m syncnorm compare
    """
    check_writable(json_file)
    try:
        comparison = run(
            None if arms is None else [name.strip() for name in arms.split(",")],
            ranks=ranks,
            batch_per_rank=batch_per_rank,
            steps=steps,
            parity_steps=parity_steps,
            seed=seed,
            progress=progress_on_stderr,
        )
    except InputError as error:
        raise click.UsageError(str(error)) from error
    if speaks():
        if json_file is not None:  # first: printing fails where nobody reads on
            write_json(comparison, json_file)
        print_comparison(comparison)
