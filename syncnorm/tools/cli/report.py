"""``syncnorm report``."""

from __future__ import annotations

import importlib
from pathlib import Path

import click

from syncnorm.tools.cli.options import file_option
from syncnorm.tools.cli.results import Results
from syncnorm.tools.report.compare_html import write_page
from syncnorm.tools.report.runs import read_runs
from syncnorm.tools.report.runs_terminal import print_runs


@click.command(short_help="The report of earlier comparisons, one or several side by side.")
@click.argument("files", nargs=-1, required=True, metavar="FILE...", type=click.Path(path_type=Path))
@file_option("html", "Also write the report with plots to FILE, a self-contained page.")
def report(files: tuple[Path, ...], html_file: Path | None) -> int:
    """Prints what comparisons found, from the files that compare --json has written.

    Of several comparisons it first prints what differs between them, and their decisions and results side by side:

    syncnorm report before.json after.json --html both.html
    """
    if html_file is not None:
        for package in ("jinja2", "matplotlib"):
            importlib.import_module(package)
    with Results(print_runs, (html_file, write_page)) as results:
        results.keep(read_runs(files))
    return results.exit_code
