"""``syncnorm study``: a command for each question."""

from __future__ import annotations

import importlib
from pathlib import Path

import click

from syncnorm.tools.cli.norms import norms
from syncnorm.tools.cli.results import Results
from syncnorm.tools.common.ranks import DEFAULT_RANKS
from syncnorm.tools.common.records import write_json
from syncnorm.tools.report.progress import counted_on_stderr
from syncnorm.tools.report.study_markdown import write_markdown
from syncnorm.tools.report.study_plot import write_plot
from syncnorm.tools.report.study_terminal import print_study
from syncnorm.tools.study import STUDIES, run
from syncnorm.tools.study.question import Question

_FILE = click.Path(dir_okay=False, path_type=Path)


@click.group(short_help="Questions from the literature, answered on real data.")
def study() -> None:
    """Answer a question from the literature by training on real data, several seeds each.

    Alone it starts gloo ranks on this machine, one thread each. Under a launcher it uses the ranks that it is given.
    """


def _command(question: Question) -> click.Command:
    def call(
        ranks: int | None,
        seeds: int | None,
        steps: int | None,
        quick: bool,
        json_file: Path | None,
        plot_file: Path | None,
        markdown_file: Path | None,
    ) -> int:
        if plot_file is not None:
            importlib.import_module("matplotlib")  # missing: told now, not after the training
        files = ((json_file, write_json), (plot_file, write_plot), (markdown_file, write_markdown))
        with Results(print_study, *files) as results:
            study = run(
                question.name,
                ranks=ranks,
                seeds=seeds,
                steps=steps,
                quick=quick,
                progress=counted_on_stderr,
                keep=results.keep,
            )
            results.keep(study)
        return results.exit_code

    options = (
        click.option("--ranks", type=int, metavar="N", help=f"Ranks to start, {DEFAULT_RANKS} by default."),
        click.option("--seeds", type=int, metavar="N", help=f"Runs of each condition, {question.seeds} by default."),
        click.option("--steps", type=int, metavar="N", help=f"{question.steps_are}, {question.steps} by default."),
        click.option("--quick", is_flag=True, help="A short run that shows that it works; its findings mean little."),
        click.option("--json", "json_file", type=_FILE, metavar="FILE", help="Write the record to FILE as well."),
        click.option("--plot", "plot_file", type=_FILE, metavar="FILE.png", help="Draw it."),
        click.option("--markdown", "markdown_file", type=_FILE, metavar="FILE", help="Write it as Markdown."),
    )
    for option in reversed(options):
        call = option(call)
    text = f"{question.question}\n\n{question.claim.source}: {question.claim.text}"
    return click.command(question.name, short_help=question.about, help=text)(call)


for _question in STUDIES.values():
    study.add_command(_command(_question))
study.add_command(norms)
