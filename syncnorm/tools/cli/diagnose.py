"""``syncnorm diagnose``."""

from __future__ import annotations

from pathlib import Path
from statistics import quantiles

import click
import torch.nn.functional as F

from syncnorm.monitor.findings import Findings, wrapped
from syncnorm.tools.cli.options import FUNCTION, json_option, ranks_option
from syncnorm.tools.cli.results import Results
from syncnorm.tools.common.data import digits
from syncnorm.tools.common.loading import load
from syncnorm.tools.common.nets import build_residual_net
from syncnorm.tools.common.records import write_json
from syncnorm.tools.diagnose import BLOCK_STEPS, Overhead, TrainingRun
from syncnorm.tools.diagnose import diagnose as run_diagnose
from syncnorm.tools.report.consoles import print_text


@click.command(short_help="Watches the batch norms of a model in training.")
@click.option("--model", metavar=FUNCTION, help="Returns the model; a small residual network by default.")
@click.option(
    "--data",
    metavar=FUNCTION,
    help="Returns (training, test) data of (input, target); scikit-learn's digits by default.",
)
@click.option("--loss", metavar=FUNCTION, help="Loss of (output, target); cross-entropy by default.")
@ranks_option
@click.option(
    "--batch-per-rank", type=int, default=4, show_default=True, metavar="N", help="Samples per rank and step."
)
@click.option("--steps", type=int, default=100, show_default=True, metavar="N", help="Number of training steps.")
@click.option("--every", type=int, default=20, show_default=True, metavar="N", help="Sample every N-th step.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the weights and the order of the data.")
@click.option("--no-sync", is_flag=True, help="Do not convert the model's batch norms.")
@click.option(
    "--overhead",
    "repetitions",
    type=int,
    default=0,
    metavar="N",
    help=f"Measure the overhead of the monitor instead: N alternating blocks of {BLOCK_STEPS} steps per setting.",
)
@json_option
def diagnose(
    model: str | None,
    data: str | None,
    loss: str | None,
    ranks: int | None,
    no_sync: bool,
    json_file: Path | None,
    **numbers: int,
) -> int:
    """Train a model under syncnorm.monitor.monitor and print what it found.

    For each batch norm: how much the statistics differ between ranks, how long each rank waits and for which rank,
    and whether the running statistics are the same on all ranks. Without a launcher it starts gloo ranks on this
    machine. Under a launcher it uses the launcher's ranks:

    torchrun --nproc-per-node 2 -m syncnorm diagnose --model nets:build --data nets:datasets
    """
    if numbers["repetitions"] and json_file is not None:
        raise click.UsageError("--json writes the findings, and --overhead has none: leave one out")
    with Results(_print, (json_file, _write_json)) as results:
        run = TrainingRun(
            build=build_residual_net if model is None else load(model, "--model"),
            datasets=digits if data is None else load(data, "--data"),
            loss=F.cross_entropy if loss is None else load(loss, "--loss"),
            sync=not no_sync,
            print_line=_print_step,
            **numbers,
        )
        results.keep(run_diagnose(run, ranks))
    return results.exit_code


def _print_step(line: str) -> None:
    print_text(wrapped(line, indent="  "))


def _print(found: Findings | Overhead) -> None:
    print_text(_overhead_text(found) if isinstance(found, Overhead) else f"\n{found}")


def _write_json(found: Findings | Overhead, path: Path) -> None:
    assert isinstance(found, Findings)  # --overhead excludes --json
    write_json(found, path)


def _overhead_text(found: Overhead) -> str:
    lines = [f"{'monitor':<10} {'ms per step':>12} {'ratio to off, p25-p50-p75':>28}"]
    for name, ratios in found.ratios.items():
        low, middle, high = quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        lines.append(f"{name:<10} {found.step_ms[name]:>12.2f} {f'{low:.3f} - {middle:.3f} - {high:.3f}':>28}")
    return "\n".join(lines)
