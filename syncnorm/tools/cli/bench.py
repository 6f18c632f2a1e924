"""``syncnorm bench``, and a subcommand for each benchmark."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from syncnorm.tools.bench import (
    Benchmark,
    Parameters,
    RunOptions,
    run_layer,
    run_layer_and_model,
    run_model,
    run_scaling,
)
from syncnorm.tools.bench.records import DEFAULT_BATCH_PER_RANK, DEFAULT_REPETITIONS
from syncnorm.tools.bench.scaling import DEFAULT_LARGEST_WORLD
from syncnorm.tools.bench.shapes import DTYPES, parse_shapes
from syncnorm.tools.bench.single_process import DEFAULT_FAKE_RANKS
from syncnorm.tools.cli.options import RANKS_HELP, file_option, json_option, ranks_option
from syncnorm.tools.cli.results import Results
from syncnorm.tools.common.records import write_json
from syncnorm.tools.report.bench_csv import write_csv
from syncnorm.tools.report.bench_plot import write_plot
from syncnorm.tools.report.bench_terminal import print_benchmark
from syncnorm.tools.report.progress import counted_on_stderr

_DEFAULTS = Parameters()

_DEVICE = click.option("--device", metavar="DEVICE", help="cpu or cuda; by default cuda if there is a GPU.")
_REPETITIONS = click.option(
    "--repetitions",
    type=int,
    metavar="N",
    help=f"Blocks and, at least, single calls per contender, {DEFAULT_REPETITIONS} by default.",
)
_QUICK = click.option(
    "--quick", is_flag=True, help="A short run to see that everything works; its figures mean little."
)
_CSV = file_option("csv", "Write the rows of the layer to FILE, a line per contender.")
_PLOT = file_option("plot", "Plot the time by the input's size.", "FILE.png")


def _deliver(
    run: Callable[[RunOptions], Benchmark],
    json_file: Path | None,
    csv_file: Path | None = None,
    plot_file: Path | None = None,
    **options: Any,
) -> int:
    """Runs a benchmark with the ``options`` of `RunOptions`, and prints and writes its record; the exit code."""
    if plot_file is not None:
        importlib.import_module("matplotlib")  # if it is missing, fail now and not after the measurement
    files = ((json_file, write_json), (csv_file, write_csv), (plot_file, write_plot))
    with Results(print_benchmark, *files) as results:
        results.keep(run(RunOptions(**options, progress=counted_on_stderr, keep=results.keep)))
    return results.exit_code


@click.group(invoke_without_command=True, short_help="The speed of the layer compared with other implementations.")
@ranks_option
@_DEVICE
@_REPETITIONS
@_QUICK
@json_option
@_CSV
@_PLOT
@click.pass_context
def bench(context: click.Context, /, device: str | None, **options: Any) -> int:
    """Time the synchronized layer compared with other implementations of batch norm.

    Without a subcommand: layer and model with their defaults, in one result. Subcommands have more options.

    Alone it starts gloo ranks on this machine, one thread each. Under a launcher it uses the launcher's ranks:

    torchrun --nproc-per-node 2 -m syncnorm bench
    """
    if context.invoked_subcommand is None:
        return _deliver(lambda run_options: run_layer_and_model(run_options, device=device), **options)
    if any(context.get_parameter_source(name) == ParameterSource.COMMANDLINE for name in context.params):
        raise click.UsageError(f"options go after the subcommand: syncnorm bench {context.invoked_subcommand} ...")
    return 0


@bench.command(short_help="A forward and a backward of the layer, by shape.")
@click.option(
    "--ranks",
    "--world",
    "ranks",
    type=int,
    metavar="N",
    help=f"{RANKS_HELP} Of the fake backend: the size of the world, {DEFAULT_FAKE_RANKS} by default.",
)
@click.option(
    "--backend",
    metavar="BACKEND",
    help="gloo, the default: starts ranks. fake: rank 0 of a world without the other ranks, which shows kernels and "
    "launches without wires. nccl: one rank on a GPU that synchronizes with itself.",
)
@_DEVICE
@click.option(
    "--dtypes",
    metavar="A,B",
    default=",".join(DTYPES),
    show_default=True,
    help="Of the input; parameters stay fp32.",
)
@click.option(
    "--shapes",
    metavar="N,C,..;..",
    help="Of the input of a rank, or the name of a table, cpu or gpu; by default the table of the device.",
)
@_REPETITIONS
@_QUICK
@json_option
@_CSV
@_PLOT
def layer(backend: str | None, device: str | None, dtypes: str, shapes: str | None, **options: Any) -> int:
    """Time a forward and a backward of the synchronized layer, by shape, memory format and dtype.

    Contenders: local batch norm, local batch norm with two bare collectives, the common E[x^2] workaround, and
    torch.nn.SyncBatchNorm where it runs. On CPUs they are timed as in a model, call by call after other work, and in
    blocks beside that; a small table shows how long one exchange between the ranks takes.

    On one GPU, in a world of eight ranks without wires:

    syncnorm bench layer --device cuda --backend fake --world 8
    """
    return _deliver(
        lambda run_options: run_layer(
            run_options,
            device=device,
            backend=backend,
            dtypes=[name.strip() for name in dtypes.split(",")],
            shapes=None if shapes is None else parse_shapes(shapes),
        ),
        **options,
    )


@bench.command(short_help="A training step of a residual network, compared with plain DDP.")
@ranks_option
@click.option(
    "--backend",
    metavar="BACKEND",
    help="gloo, the default: starts ranks. nccl: one rank on a GPU that synchronizes with itself.",
)
@_DEVICE
@_REPETITIONS
@_QUICK
@click.option(
    "--batch-per-rank",
    type=int,
    default=DEFAULT_BATCH_PER_RANK,
    show_default=True,
    metavar="N",
    help="Images per rank and step.",
)
@click.option("--compile", "compiled", is_flag=True, help="Time the compiled model too.")
@click.option(
    "--profile",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Write traces of the step of the synchronized model to DIR, and show how long each norm layer waits.",
)
@json_option
def model(
    backend: str | None, device: str | None, batch_per_rank: int, compiled: bool, profile: Path | None, **options: Any
) -> int:
    """Time the training step of a residual network under DistributedDataParallel.

    Arms: local batch norm, local batch norm with two bare collectives at each layer, and the same model converted.
    """
    return _deliver(
        lambda run_options: run_model(
            run_options,
            device=device,
            backend=backend,
            batch_per_rank=batch_per_rank,
            compiled=compiled,
            profile=profile,
        ),
        **options,
    )


@bench.command(short_help="The cost by ranks, channels and layers; a cost model of larger worlds.")
@click.option(
    "--ranks", type=int, metavar="N", help=f"Of the largest measured world, {DEFAULT_LARGEST_WORLD} by default."
)
@_REPETITIONS
@_QUICK
@click.option("--simulate", type=int, metavar="N", help="Predict the cost in worlds of up to N ranks.")
@click.option("--latency-us", type=float, metavar="US", help="Simulated gloo: per exchange; fitted by default.")
@click.option("--per-message-us", type=float, metavar="US", help="Simulated gloo: per other rank; fitted by default.")
@click.option("--bandwidth-gb", type=float, metavar="GB", help="Simulated gloo: GB/s of a rank; fitted by default.")
@click.option(
    "--nccl-launch-us",
    type=float,
    metavar="US",
    default=_DEFAULTS.nccl_launch_us,
    show_default=True,
    help="Simulated NCCL: per collective.",
)
@click.option(
    "--nccl-hop-us",
    type=float,
    metavar="US",
    default=_DEFAULTS.nccl_hop_us,
    show_default=True,
    help="Simulated NCCL: per hop of a ring between nodes.",
)
@click.option(
    "--nccl-bandwidth-gb",
    type=float,
    metavar="GB",
    default=_DEFAULTS.nccl_bandwidth_gb,
    show_default=True,
    help="Simulated NCCL: GB/s of a rank between nodes.",
)
@json_option
@file_option("plot", "Plot the cost by the number of ranks.", "FILE.png")
def scaling(
    simulate: int | None,
    ranks: int | None,
    repetitions: int | None,
    quick: bool,
    json_file: Path | None,
    plot_file: Path | None,
    **network: float,
) -> int:
    """Time layers and exchanges in worlds of 1, 2, 3 and 4 gloo ranks on the CPU, in turn.

    With --simulate, a cost model that is fitted to these worlds predicts the cost in larger ones:

    syncnorm bench scaling --simulate 1024
    """
    return _deliver(
        lambda run_options: run_scaling(run_options, simulated_ranks=simulate, parameters=Parameters(**network)),
        json_file,
        plot_file=plot_file,
        ranks=ranks,
        repetitions=repetitions,
        quick=quick,
    )
