"""``syncnorm bench``."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import click

from syncnorm.tools.bench import Parameters, run
from syncnorm.tools.bench.growth_runner import DEFAULT_LARGEST_WORLD
from syncnorm.tools.bench.lone import FAKE_WORLD
from syncnorm.tools.bench.runner import DEFAULT_BATCH_PER_RANK, DEFAULT_REPETITIONS, WHAT
from syncnorm.tools.bench.shapes import DTYPES, parse_shapes
from syncnorm.tools.cli.results import Results
from syncnorm.tools.common.ranks import DEFAULT_RANKS
from syncnorm.tools.common.records import write_json
from syncnorm.tools.report.bench_csv import write_csv
from syncnorm.tools.report.bench_plot import write_plot
from syncnorm.tools.report.bench_terminal import print_benchmark
from syncnorm.tools.report.progress import counted_on_stderr

RING = Parameters()
_FILE = click.Path(dir_okay=False, path_type=Path)


@click.command(short_help="The synced layer's speed against its peers.")
@click.option(
    "--what",
    metavar="WHAT",
    help=f"One of {', '.join(WHAT)}; all, the first two, by default, layer with the fake backend.",
)
@click.option(
    "--ranks",
    "--world",
    "ranks",
    type=int,
    metavar="N",
    help=f"Ranks to start, {DEFAULT_RANKS} by default; not under a launcher. Of growth: the largest world, "
    f"{DEFAULT_LARGEST_WORLD} by default. Of the fake backend: {FAKE_WORLD} by default.",
)
@click.option(
    "--backend",
    metavar="BACKEND",
    help="gloo, by default: ranks of our own. fake: one process in a world without the others, which shows kernels "
    "and launches without wires. nccl: one rank on a GPU that synchronises with itself.",
)
@click.option("--device", metavar="DEVICE", help="cpu or cuda; cuda by default where there is one.")
@click.option(
    "--dtypes",
    metavar="A,B",
    default=",".join(DTYPES),
    show_default=True,
    help="Of the layer's input; parameters stay fp32.",
)
@click.option(
    "--shapes",
    metavar="N,C,..;..",
    help="Of the layer's input on a rank, or the name of a table, cpu or gpu; the device's by default.",
)
@click.option(
    "--repetitions", type=int, metavar="N", help=f"Blocks of each contender, {DEFAULT_REPETITIONS} by default."
)
@click.option("--quick", is_flag=True, help="A short run that shows that it works; its figures mean little.")
@click.option(
    "--batch-per-rank",
    type=int,
    default=DEFAULT_BATCH_PER_RANK,
    show_default=True,
    metavar="N",
    help="Images that a rank's model sees a step.",
)
@click.option("--compile", "compiled", is_flag=True, help="Time the compiled model too.")
@click.option(
    "--profile",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Write traces of the synced model's step to DIR, and show how long each norm layer waits.",
)
@click.option("--json", "json_file", type=_FILE, metavar="FILE", help="Write the result to FILE as well.")
@click.option("--csv", "csv_file", type=_FILE, metavar="FILE", help="Write the layers' rows to FILE, a line a peer.")
@click.option("--plot", "plot_file", type=_FILE, metavar="FILE.png", help="Draw cost against size, or ranks.")
@click.option(
    "--simulate",
    type=int,
    metavar="N",
    help="What a cost model says of worlds of up to N ranks: --what growth, and what follows from it.",
)
@click.option("--latency-us", type=float, metavar="US", help="Simulated: of an exchange; fitted by default.")
@click.option("--per-message-us", type=float, metavar="US", help="Simulated: for each other rank; fitted by default.")
@click.option("--bandwidth-gb", type=float, metavar="GB", help="Simulated: GB/s of a rank; fitted by default.")
@click.option(
    "--nccl-launch-us", type=float, metavar="US", default=RING.nccl_launch_us, show_default=True, help="Simulated."
)
@click.option(
    "--nccl-hop-us", type=float, metavar="US", default=RING.nccl_hop_us, show_default=True, help="Simulated."
)
@click.option(
    "--nccl-bandwidth-gb",
    type=float,
    metavar="GB",
    default=RING.nccl_bandwidth_gb,
    show_default=True,
    help="Simulated.",
)
def bench(
    what: str | None,
    ranks: int | None,
    backend: str | None,
    device: str | None,
    dtypes: str,
    shapes: str | None,
    repetitions: int | None,
    quick: bool,
    batch_per_rank: int,
    compiled: bool,
    profile: Path | None,
    json_file: Path | None,
    csv_file: Path | None,
    plot_file: Path | None,
    simulate: int | None,
    **network: Any,
) -> int:
    """Time the synced layer against local batch norm, the bare collectives and the usual work-around.

    Alone it starts gloo ranks on this machine, one thread each. Under a launcher it uses the ranks that it is given:

    torchrun --nproc-per-node 2 -m syncnorm bench

    On one GPU, beside torch.nn.SyncBatchNorm in a world of eight that has no wires:

    syncnorm bench --device cuda --backend fake --world 8

    How the cost grows with ranks, channels and layers, and what a cost model says of worlds that are not at hand:

    syncnorm bench --simulate 1024
    """
    if what is None:
        what = "growth" if simulate is not None else "layer" if backend == "fake" else "all"
    if what == "growth" and csv_file is not None:
        raise click.UsageError("--csv has the layers' rows, and growth has none: take --json")
    if plot_file is not None:
        importlib.import_module("matplotlib")  # missing: told now, not after the measuring
    files = ((json_file, write_json), (csv_file, write_csv), (plot_file, write_plot))
    with Results(print_benchmark, *files) as results:
        benchmark = run(
            what,
            ranks=ranks,
            backend=backend,
            device=device,
            dtypes=[name.strip() for name in dtypes.split(",")],
            shapes=None if shapes is None else parse_shapes(shapes),
            repetitions=repetitions,
            batch_per_rank=batch_per_rank,
            quick=quick,
            compiled=compiled,
            profile=profile,
            simulate=simulate,
            parameters=Parameters(**network),
            progress=counted_on_stderr,
            keep=results.keep,
        )
        results.keep(benchmark)
    return results.exit_code
