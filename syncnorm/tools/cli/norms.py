"""``syncnorm study norms``: what each norm averages over, as a picture."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path

import click

from syncnorm.tools.cli.results import Results
from syncnorm.tools.report.consoles import PlainTable, console
from syncnorm.tools.report.norms_plot import described, write_norms_plot
from syncnorm.tools.study.footprints import LAYERS, Footprint, footprints


@click.command(short_help="What each norm averages over, as a picture.")
@click.option(
    "--plot",
    "plot_file",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE.png",
    help="Draw it: the values of two ranks, and those that share their statistics with one of them.",
)
def norms(plot_file: Path | None) -> int:
    """What does each norm average over?

    Asked of the layers themselves: one value of the input of two ranks is changed, and the outputs that move are
    those that share its statistics. Takes some seconds.
    """
    if plot_file is not None:
        importlib.import_module("matplotlib")  # missing: told now
    with Results(_print_footprints, (plot_file, write_norms_plot)) as results:
        results.keep(footprints())
    return results.exit_code


def _print_footprints(found: Sequence[Footprint]) -> None:
    table = PlainTable(header=False)
    for footprint in found:
        table.add_row(LAYERS[footprint.norm].title, described(footprint))
    console().print(table)
