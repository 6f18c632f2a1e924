"""``syncnorm study``: a command per study, and ``norms``, which shows what each norm averages over."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path

import click

from syncnorm.tools.cli.options import file_option, json_option, ranks_option
from syncnorm.tools.cli.results import Results
from syncnorm.tools.common.decision import DEFAULT_MARGIN_PERCENT, DEFAULT_MARGIN_POINTS
from syncnorm.tools.common.records import write_json
from syncnorm.tools.report.consoles import PlainTable, console
from syncnorm.tools.report.norms_plot import described, write_norms_plot
from syncnorm.tools.report.progress import counted_on_stderr
from syncnorm.tools.report.study_plot import write_plot
from syncnorm.tools.report.study_text import print_study, write_markdown
from syncnorm.tools.study import STUDIES, run
from syncnorm.tools.study.footprints import LAYERS, Footprint, footprints
from syncnorm.tools.study.records import Question


@click.group(short_help="Questions from the literature, answered on real data.")
def study() -> None:
    """Answer a question from the literature by training on real data with several seeds.

    Under a launcher it uses the launched ranks; otherwise it starts gloo ranks on this machine, one thread each.
    """


def _command(question: Question) -> click.Command:
    def call(
        ranks: int | None,
        seeds: int | None,
        steps: int | None,
        margin: float | None,
        quick: bool,
        json_file: Path | None,
        plot_file: Path | None,
        markdown_file: Path | None,
    ) -> int:
        _require_matplotlib(plot_file)
        files = ((json_file, write_json), (plot_file, write_plot), (markdown_file, write_markdown))
        with Results(print_study, *files) as results:
            study = run(
                question.name,
                ranks=ranks,
                seeds=seeds,
                steps=steps,
                quick=quick,
                margin=margin,
                progress=counted_on_stderr,
                keep=results.keep,
            )
            results.keep(study)
        return results.exit_code

    options = (
        ranks_option,
        click.option("--seeds", type=int, metavar="N", help=f"Runs of each condition, {question.seeds} by default."),
        click.option("--steps", type=int, metavar="N", help=f"{question.steps_help}, {question.steps} by default."),
        click.option("--margin", type=float, metavar="X", help=_margin(question)),
        click.option("--quick", is_flag=True, help="A short run to check that it works; its findings mean little."),
        json_option,
        file_option("plot", "Also plot it.", "FILE.png"),
        file_option("markdown", "Also write it as Markdown."),
    )
    for option in reversed(options):
        call = option(call)
    text = f"{question.question}\n\n{question.claim.source}: {question.claim.text}"
    return click.command(question.name, short_help=question.about, help=text)(call)


def _margin(question: Question) -> str:
    unit, default = "percent", DEFAULT_MARGIN_PERCENT
    if question.rule.share:
        unit, default = "percentage points", DEFAULT_MARGIN_POINTS
    return f"Largest difference that does not matter, in {unit}; {default:g} by default."


def _require_matplotlib(plot_file: Path | None) -> None:
    """Raises ModuleNotFoundError before the work starts, not when the plot is drawn."""
    if plot_file is not None:
        importlib.import_module("matplotlib")


@click.command(short_help="What each norm averages over, as a picture.")
@file_option(
    "plot", "Plot it: the values of two ranks, and those that share their statistics with one of them.", "FILE.png"
)
def norms(plot_file: Path | None) -> int:
    """What does each norm average over?

    Measured on the layers: one input value of two ranks is changed, and the outputs that change are those that share
    its statistics. Takes a few seconds.
    """
    _require_matplotlib(plot_file)
    with Results(_print_footprints, (plot_file, write_norms_plot)) as results:
        results.keep(footprints())
    return results.exit_code


def _print_footprints(found: Sequence[Footprint]) -> None:
    table = PlainTable(header=False)
    for footprint in found:
        table.add_row(LAYERS[footprint.norm].title, described(footprint))
    console().print(table)


for _question in STUDIES.values():
    study.add_command(_command(_question))
study.add_command(norms)
