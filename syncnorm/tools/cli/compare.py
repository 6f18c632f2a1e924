"""``syncnorm compare``."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import click

from syncnorm.tools.cli.results import Results
from syncnorm.tools.common.decision import DEFAULT_MARGIN_PERCENT, DEFAULT_MARGIN_POINTS
from syncnorm.tools.common.durations import seconds
from syncnorm.tools.common.launcher import is_main_rank
from syncnorm.tools.common.loading import load
from syncnorm.tools.common.ranks import DEFAULT_RANKS
from syncnorm.tools.common.records import write_json
from syncnorm.tools.compare.arms import ARMS, DEFAULT_ARMS
from syncnorm.tools.compare.problem import Problem
from syncnorm.tools.compare.records import Comparison, Sweep
from syncnorm.tools.compare.runner import (
    DEFAULT_BATCH_PER_RANK,
    DEFAULT_LR,
    DEFAULT_PARITY_STEPS,
    DEFAULT_SEEDS,
    DEFAULT_STEPS,
    make_settings,
    sweep,
)
from syncnorm.tools.report.compare_html import write_html
from syncnorm.tools.report.compare_terminal import print_comparison
from syncnorm.tools.report.progress import progress_on_stderr

FUNCTION = "MODULE:FUNCTION"


@click.command(short_help="DataParallel, DDP and synchronized batch norm side by side.")
@click.option("--model", metavar=FUNCTION, help="Returns the model with its batch norms; a small CNN by default.")
@click.option(
    "--data",
    metavar=FUNCTION,
    help="Returns map-style training and test datasets of (input, target); scikit-learn's digits by default.",
)
@click.option("--loss", metavar=FUNCTION, help="(output, target) -> mean over the samples; cross-entropy by default.")
@click.option(
    "--arms",
    metavar="A,B,...",
    help=f"Arms to run in addition to single, of {', '.join(ARMS)}; {','.join(DEFAULT_ARMS[1:])} by default.",
)
@click.option(
    "--ranks",
    type=int,
    metavar="N",
    help=f"Number of ranks to start, {DEFAULT_RANKS} by default; omit it under a launcher.",
)
@click.option(
    "--batch-per-rank",
    default=str(DEFAULT_BATCH_PER_RANK),
    show_default=True,
    metavar="N,M,...",
    help="Samples per rank and step; several values make one comparison each.",
)
@click.option(
    "--steps", type=int, default=DEFAULT_STEPS, show_default=True, metavar="N", help="Training steps of each run."
)
@click.option(
    "--parity-steps",
    type=int,
    metavar="K",
    help=f"Measure parity at a few steps up to step K, {DEFAULT_PARITY_STEPS} by default.",
)
@click.option(
    "--seed", type=int, default=0, show_default=True, help="First seed of the weights and of the order of the data."
)
@click.option(
    "--seeds",
    default=str(DEFAULT_SEEDS),
    show_default=True,
    metavar="N|auto",
    help="Train every arm with N consecutive seeds; auto adds seeds until the results decide or --budget is used up.",
)
@click.option(
    "--budget", default="10m", show_default=True, metavar="TIME", help="Training time for --seeds auto: 90s, 10m, 1h."
)
@click.option(
    "--margin",
    type=float,
    help="Largest difference that does not matter: in percentage points for a metric between 0 and 1 "
    f"({DEFAULT_MARGIN_POINTS:g} by default), in percent for others ({DEFAULT_MARGIN_PERCENT:g} by default).",
)
@click.option(
    "--lr",
    type=float,
    default=DEFAULT_LR,
    show_default=True,
    help="Initial learning rate of SGD with momentum and a cosine schedule.",
)
@click.option(
    "--json",
    "json_file",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Also write the result to FILE.",
)
@click.option(
    "--html",
    "html_file",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Also write a report with plots to FILE, a self-contained page.",
)
def compare(
    model: str | None,
    data: str | None,
    loss: str | None,
    arms: str | None,
    batch_per_rank: str,
    seeds: str,
    budget: str,
    json_file: Path | None,
    html_file: Path | None,
    **numbers: Any,
) -> int:
    """Do I need SyncBN, is it correct, what does it cost, or is GroupNorm as good?

    Trains your model, or a small one on scikit-learn's digits, with each way of normalizing, from the same weights
    on the same batches. Functions are given as package.module:function; modules in the current directory are found.

    syncnorm compare --model nets:build --data nets:datasets --arms ddp,ddp+syncbn,ddp+group --seeds 3

    Without a launcher it starts gloo ranks on this machine. Under a launcher it runs on the launched ranks:

    torchrun --nproc-per-node 2 -m syncnorm compare
    """
    if html_file is not None:
        for package in ("jinja2", "matplotlib"):
            importlib.import_module(package)  # if missing, fail now and not after the training
    sizes = _sizes(batch_per_rank)

    def write_record(found: Sequence[Comparison], path: Path) -> None:
        write_json(Sweep(tuple(found)) if len(sizes) > 1 else found[0], path)

    with Results(_print_last, (json_file, write_record), (html_file, write_html)) as results:
        problem = Problem.of(
            None if model is None else load(model, "--model"),
            None if data is None else load(data, "--data"),
            None if loss is None else load(loss, "--loss"),
        )
        names = None if arms is None else [name.strip() for name in arms.split(",")]
        numbers |= {"seeds": _seeds(seeds), "budget": seconds(budget)}
        settings = [make_settings(arms=names, batch_per_rank=size, **numbers) for size in sizes]
        found: list[Comparison] = []

        def keep(comparison: Comparison) -> None:
            results.keep([*found, comparison])

        for comparison in sweep(problem, settings, progress_on_stderr, keep):
            found.append(comparison)
            results.keep(found)
            if len(found) < len(sizes):
                results.deliver(more=True)
    if html_file is not None and not results.exit_code and is_main_rank():
        click.echo(f"The page with plots: {html_file.resolve()}")
    return results.exit_code


def _print_last(found: Sequence[Comparison]) -> None:
    print_comparison(found[-1])


def _seeds(text: str) -> int | Literal["auto"]:
    if text == "auto":
        return "auto"
    try:
        return int(text)
    except ValueError:
        raise click.UsageError(f"--seeds must be a number or auto, got {text!r}") from None


def _sizes(text: str) -> list[int]:
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        raise click.UsageError(f"--batch-per-rank must be numbers such as 4, or 2,4,8; got {text!r}") from None
    return list(dict.fromkeys(sizes))
