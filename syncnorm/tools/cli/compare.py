"""``syncnorm compare``."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from syncnorm.tools.cli.results import Results
from syncnorm.tools.common.loading import load
from syncnorm.tools.common.ranks import DEFAULT_RANKS
from syncnorm.tools.common.records import write_json
from syncnorm.tools.compare import ARMS
from syncnorm.tools.compare.records import Comparison, Sweep
from syncnorm.tools.compare.runner import (
    DEFAULT_BATCH_PER_RANK,
    DEFAULT_LR,
    DEFAULT_PARITY_STEPS,
    DEFAULT_STEPS,
    sweep,
)
from syncnorm.tools.report.html import write_html
from syncnorm.tools.report.progress import progress_on_stderr
from syncnorm.tools.report.terminal import print_comparison

FUNCTION = "MODULE:FUNCTION"


@click.command(short_help="DataParallel, DDP and synchronized batch norm side by side.")
@click.option(
    "--model", metavar=FUNCTION, help="Returns the model, with its batch norms; a small residual network by default."
)
@click.option(
    "--data",
    metavar=FUNCTION,
    help="Returns a training and a test dataset, map-style, of (input, target); scikit-learn's digits by default.",
)
@click.option("--loss", metavar=FUNCTION, help="(output, target) -> mean over the samples; cross-entropy by default.")
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
    default=str(DEFAULT_BATCH_PER_RANK),
    show_default=True,
    metavar="N,M,...",
    help="Samples that a rank sees a step; of several, a comparison each.",
)
@click.option("--steps", type=int, default=DEFAULT_STEPS, show_default=True, metavar="N", help="Steps of each run.")
@click.option(
    "--parity-steps",
    type=int,
    metavar="K",
    help=f"Measure parity in a few steps, the last of them K, {DEFAULT_PARITY_STEPS} by default.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the weights and of the order of the data.")
@click.option(
    "--seeds",
    type=int,
    default=1,
    show_default=True,
    metavar="N",
    help="Train every arm with N seeds, from --seed on; a verdict needs 3 or so.",
)
@click.option(
    "--lr", type=float, default=DEFAULT_LR, show_default=True, help="Of SGD with momentum; falls along a cosine."
)
@click.option(
    "--json",
    "json_file",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write the result to FILE as well.",
)
@click.option(
    "--html",
    "html_file",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write a report with plots to FILE, one page that stands alone.",
)
def compare(
    model: str | None,
    data: str | None,
    loss: str | None,
    arms: str | None,
    batch_per_rank: str,
    json_file: Path | None,
    html_file: Path | None,
    **numbers: Any,
) -> int:
    """Do I need SyncBN, is it right, what does it cost, or should I take GroupNorm?

    Trains a model with each, from the same weights on the same batches: yours, or a small one on scikit-learn's
    digits. Functions are named as package.module:function; those of the current directory are found.

    syncnorm compare --model nets:build --data nets:datasets --arms ddp,ddp+syncbn,ddp+group --seeds 3

    Alone it starts gloo ranks on this machine. Under a launcher it uses the ranks that it is given:

    torchrun --nproc-per-node 2 -m syncnorm compare
    """
    if html_file is not None:
        for package in ("jinja2", "matplotlib"):
            importlib.import_module(package)  # missing: told now, not after the training
    sizes = _sizes(batch_per_rank)

    def write_record(found: Sequence[Comparison], path: Path) -> None:
        write_json(Sweep(tuple(found)) if len(sizes) > 1 else found[0], path)

    with Results(_print_last, (json_file, write_record), (html_file, write_html)) as results:
        comparisons = sweep(
            sizes,
            None if model is None else load(model, "--model"),
            None if data is None else load(data, "--data"),
            None if loss is None else load(loss, "--loss"),
            arms=None if arms is None else [name.strip() for name in arms.split(",")],
            progress=progress_on_stderr,
            **numbers,
        )
        found: list[Comparison] = []
        for comparison in comparisons:
            found.append(comparison)
            results.keep(found)
            if len(found) < len(sizes):
                results.deliver(more=True)
    return results.exit_code


def _print_last(found: Sequence[Comparison]) -> None:
    print_comparison(found[-1])


def _sizes(text: str) -> list[int]:
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        raise click.UsageError(f"--batch-per-rank takes numbers such as 4, or 2,4,8; got {text!r}") from None
    return list(dict.fromkeys(sizes))
