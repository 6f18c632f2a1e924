"""``syncnorm compare``."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import click

from syncnorm.tools.cli.job_files import JobFile
from syncnorm.tools.cli.options import FUNCTION, file_option, json_option, ranks_option
from syncnorm.tools.cli.results import Results
from syncnorm.tools.common.decision import DEFAULT_MARGIN_PERCENT, DEFAULT_MARGIN_POINTS
from syncnorm.tools.common.durations import seconds
from syncnorm.tools.common.launcher import is_main_rank
from syncnorm.tools.common.loading import load
from syncnorm.tools.common.records import write_json
from syncnorm.tools.compare.arms import ARMS, DEFAULT_ARMS
from syncnorm.tools.compare.metrics import Metric
from syncnorm.tools.compare.named_metrics import NAMED
from syncnorm.tools.compare.problem import Problem
from syncnorm.tools.compare.records import Comparison, Sweep
from syncnorm.tools.compare.runner import (
    AMP,
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


@click.command(short_help="DataParallel, DDP and synchronized batch norm side by side.")
@click.argument("job", required=False, type=JobFile(), is_eager=True)
@click.option("--model", metavar=FUNCTION, help="Returns the model with its batch norms; a small CNN by default.")
@click.option(
    "--data",
    metavar=FUNCTION,
    help="Returns map-style training and test datasets of (input, target); scikit-learn's digits by default.",
)
@click.option("--loss", metavar=FUNCTION, help="(output, target) -> mean over the samples; cross-entropy by default.")
@click.option(
    "--step",
    metavar=FUNCTION,
    help="(model, batch) -> loss, or a dict of losses, in place of --loss; the batch may be anything. With a third "
    "parameter, optimizers, the step trains by itself, as GANs do.",
)
@click.option("--collate", metavar=FUNCTION, help="List of items -> batch; torch's default_collate by default.")
@click.option(
    "--metric",
    metavar=f"NAME|{FUNCTION}",
    help=f"{', '.join(NAMED)}; or (model, batch) -> a value for each sample, with an attribute higher_is_better; or "
    "a class with update(model, batch) and compute(). By default accuracy of classes, else the loss.",
)
@click.option(
    "--optimizer",
    metavar=FUNCTION,
    help="Model -> optimizer, or a dict of several; SGD with momentum by default. The learning rate falls to zero.",
)
@click.option(
    "--arms",
    metavar="A,B,...",
    help=f"Arms to run in addition to single, of {', '.join(ARMS)}; {','.join(DEFAULT_ARMS[1:])} by default. Further "
    "arms: ddp+syncbn:N, in groups of "
    "N ranks; ddp+recalibrated, local BN with precise statistics in tests; ddp+frozen, initial statistics, for "
    "pretrained weights; accumulate:N, accumulate-exact:N and accumulate-bn:N, which split each rank's batch into N "
    "micro-batches (2 without N) with the statistics of those so far, of all, or of each alone; and module:function, "
    "which edits the model.",
)
@ranks_option
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
@click.option("--eval-batch", type=int, metavar="N", help="Test samples per forward; the batch per rank by default.")
@click.option("--accumulate", type=int, default=1, show_default=True, metavar="K", help="Batches per optimizer step.")
@click.option(
    "--num-workers", type=int, default=0, show_default=True, metavar="N", help="Loaders of training data per rank."
)
@click.option("--amp", default="", metavar="|".join(AMP), help="Autocast for training and tests; parity stays fp32.")
@json_option
@file_option("html", "Also write a report with plots to FILE, a self-contained page.")
def compare(
    job: Path | None,
    model: str | None,
    data: str | None,
    loss: str | None,
    step: str | None,
    collate: str | None,
    metric: str | None,
    optimizer: str | None,
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

    JOB is a TOML file with any of the options below, by name; options of the command line replace them, and modules
    in the folder of the file are found:

    syncnorm compare examples/jobs/segmentation.toml --html page.html

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
            _load(model, "--model"),
            _load(data, "--data"),
            _load(loss, "--loss"),
            step=_load(step, "--step"),
            collate=_load(collate, "--collate"),
            metric=load(metric, "--metric", also=Metric) if metric and ":" in metric else metric,
            optimizer=_load(optimizer, "--optimizer"),
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


def _load(name: str | None, option: str) -> Any:
    return None if name is None else load(name, option)


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
