"""``syncnorm diagnose``."""

from __future__ import annotations

from pathlib import Path
from statistics import quantiles

import click
import torch.nn.functional as F

from syncnorm.monitor.findings import Findings
from syncnorm.tools.cli.results import Results
from syncnorm.tools.common.data import digits
from syncnorm.tools.common.loading import load
from syncnorm.tools.common.nets import build_residual_net
from syncnorm.tools.common.ranks import DEFAULT_RANKS
from syncnorm.tools.common.records import write_json
from syncnorm.tools.diagnose import BLOCK, Overhead, Task
from syncnorm.tools.diagnose import diagnose as run_diagnose
from syncnorm.tools.report.consoles import say

FUNCTION = "MODULE:FUNCTION"


@click.command(short_help="A model's batch norms on a running job: spread, waits, buffers.")
@click.option("--model", metavar=FUNCTION, help="Returns the model; a small residual network by default.")
@click.option(
    "--data",
    metavar=FUNCTION,
    help="Returns (training, test) data of (input, target); scikit-learn's digits by default.",
)
@click.option("--loss", metavar=FUNCTION, help="Of (output, target); cross-entropy by default.")
@click.option(
    "--ranks", type=int, metavar="N", help=f"Ranks to start, {DEFAULT_RANKS} by default; not under a launcher."
)
@click.option(
    "--batch-per-rank", type=int, default=4, show_default=True, metavar="N", help="Samples of a rank's step."
)
@click.option("--steps", type=int, default=100, show_default=True, metavar="N", help="Training steps.")
@click.option("--every", type=int, default=20, show_default=True, metavar="N", help="Look at every N-th step.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the weights and of the order of the data.")
@click.option("--no-sync", is_flag=True, help="Leave the model's batch norms as they are; else they are converted.")
@click.option(
    "--overhead",
    type=int,
    default=0,
    metavar="N",
    help=f"Measure the monitor's own cost instead: N blocks of {BLOCK} steps each way, in turns.",
)
@click.option(
    "--json",
    "json_file",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write the findings to FILE as well.",
)
def diagnose(
    model: str | None,
    data: str | None,
    loss: str | None,
    ranks: int | None,
    batch_per_rank: int,
    steps: int,
    every: int,
    seed: int,
    no_sync: bool,
    overhead: int,
    json_file: Path | None,
) -> int:
    """Train a model under syncnorm.monitor.monitor, and say what it found.

    For each batch norm: how far the ranks' statistics are apart, how long each rank waits and for whom, and whether
    running statistics are the same on all ranks. Alone it starts gloo ranks; under a launcher it uses the ranks that
    it is given:

    torchrun --nproc-per-node 2 -m syncnorm diagnose --model nets:build --data nets:datasets
    """
    if overhead and json_file is not None:
        raise click.UsageError("--json has the findings, and --overhead has none: leave one out")
    with Results(_print, (json_file, _write_json)) as results:
        task = Task(
            build=build_residual_net if model is None else load(model, "--model"),
            datasets=digits if data is None else load(data, "--data"),
            loss=F.cross_entropy if loss is None else load(loss, "--loss"),
            sync=not no_sync,
            batch_per_rank=batch_per_rank,
            steps=steps,
            every=every,
            seed=seed,
            repetitions=overhead,
            say=say,
        )
        results.keep(run_diagnose(task, ranks))
    return results.exit_code


def _print(found: Findings | Overhead) -> None:
    say(_overhead_text(found) if isinstance(found, Overhead) else f"\n{found}")


def _write_json(found: Findings | Overhead, path: Path) -> None:
    assert isinstance(found, Findings)  # --overhead has no --json
    write_json(found, path)


def _overhead_text(found: Overhead) -> str:
    lines = [f"{'monitor':<10} {'ms a step':>10} {'ratio to off, p25-p50-p75':>28}"]
    for name, ratios in found.ratios.items():
        low, middle, high = quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        lines.append(f"{name:<10} {found.step_ms[name]:>10.2f} {f'{low:.3f} - {middle:.3f} - {high:.3f}':>28}")
    return "\n".join(lines)
