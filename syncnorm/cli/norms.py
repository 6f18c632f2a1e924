"""``syncnorm study norms``: what each norm averages over, as a picture."""

from __future__ import annotations

import importlib
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from syncnorm.cli.files import check_writable
from syncnorm.launcher import speaks
from syncnorm.report.norms_plot import described, write_norms_plot
from syncnorm.study.footprints import LAYERS, footprints


@click.command(short_help="What each norm averages over, as a picture.")
@click.option(
    "--plot",
    "plot_file",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE.png",
    help="Draw it: the values of two ranks, and those that share their statistics with one of them.",
)
def norms(plot_file: Path | None) -> None:
    """What does each norm average over?

    Asked of the layers themselves: one value of the input of two ranks is changed, and the outputs that move are
    those that share its statistics. Takes some seconds.
    """
    check_writable(plot_file)
    if plot_file is not None:
        importlib.import_module("matplotlib")  # missing: told now
    found = footprints()
    if not speaks():
        return
    if plot_file is not None:
        write_norms_plot(found, plot_file)
    table = Table(box=None, pad_edge=False, show_header=False)
    for footprint in found:
        table.add_row(LAYERS[footprint.norm].title, described(footprint))
    Console().print(table)
