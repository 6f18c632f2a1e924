"""``run``: checks what is asked, finds or starts the ranks, and has them measure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from syncnorm.errors import InputError
from syncnorm.tools.bench.growth_runner import GROWTH_BLOCK_SECONDS, check_growth, run_growth
from syncnorm.tools.bench.lone import check_backend, run_alone
from syncnorm.tools.bench.models import WIDTH
from syncnorm.tools.bench.profiling import make_folder
from syncnorm.tools.bench.records import Benchmark, Settings
from syncnorm.tools.bench.session import measure_on_rank
from syncnorm.tools.bench.shapes import DTYPES, Shape
from syncnorm.tools.bench.simulation import Parameters
from syncnorm.tools.common.launcher import launched_world_size
from syncnorm.tools.common.progress import ProgressFactory, silent
from syncnorm.tools.common.provenance import command_line
from syncnorm.tools.common.ranks import Keep, a_gpu_for_each_launched_rank, discard, ranks_for, torch_threads

WHAT = ("layer", "model", "all", "growth")
DEFAULT_REPETITIONS = 15
DEFAULT_BATCH_PER_RANK = 8
SIDE = 64
# Long against a clock's resolution and a barrier's jitter, short against what else goes on in the machine.
BLOCK_SECONDS = 0.02
DEFAULT_PARAMETERS = Parameters()
QUICK_REPETITIONS, QUICK_BLOCK_SECONDS, QUICK_SIDE, QUICK_WIDTH = 2, 0.002, 16, 8
# Only to end a run whose ranks hang.
TIMEOUT_S = 6 * 3600.0


def run(
    what: str = "all",
    *,
    ranks: int | None = None,
    device: str | None = None,
    dtypes: Sequence[str] = tuple(DTYPES),
    shapes: Sequence[Shape] | None = None,
    repetitions: int | None = None,
    batch_per_rank: int = DEFAULT_BATCH_PER_RANK,
    quick: bool = False,
    compiled: bool = False,
    profile: Path | None = None,
    simulate: int | None = None,
    backend: str | None = None,
    parameters: Parameters = DEFAULT_PARAMETERS,
    progress: ProgressFactory = silent,
    keep: Keep = discard,
) -> Benchmark:
    """Times the synced layer against its peers, and a residual network's training step against plain DDP.

    Under a launcher it uses the ranks that it was given; alone it starts gloo ranks on this machine, which share
    its GPUs where ``device`` is ``"cuda"``. A rank on a CPU runs on one thread.

    Args:
        what: ``"layer"``, ``"model"`` or ``"all"``, which is the two of them; ``"growth"``: what a layer costs in
            worlds of 1, 2, 3 and 4 ranks of our own.
        ranks: how many ranks to start; 2 by default. Under a launcher it must agree with the launcher's. Of growth,
            the largest world.
        device: ``"cpu"`` or ``"cuda"``; by default cuda where there is one.
        dtypes: of the layer's input, names out of ``DTYPES``.
        shapes: of the layer's input on a rank; the device's table by default.
        repetitions: blocks of each contender.
        batch_per_rank: images that each rank's model sees a step.
        quick: few repetitions of few steps, of a narrow model on small images: to see that it works.
        compiled: measure the compiled model too.
        profile: a folder for traces of the synced model's step.
        simulate: with growth: what a cost model says of worlds of up to so many ranks.
        backend: ``"gloo"`` starts ranks, which is the default; in this process alone, ``"fake"`` is a world of
            ``ranks`` (8 by default) without the others, and ``"nccl"`` a rank that synchronises with itself.
        parameters: of that model; what it does not say is fitted to the measured worlds.
        progress: opened by rank 0, in its own process, to follow the run.
        keep: called on rank 0 with a record of what is measured, at the latest before an error is raised.

    Returns:
        The record, the same on every rank.

    Raises:
        InputError: an argument that cannot be used. Judged before anything starts, alike on every rank.

    Collective: under a launcher, all ranks.
    """
    if what not in WHAT:
        raise InputError(f"what must be one of {', '.join(WHAT)}, got {what!r}")
    for name in dtypes:
        if name not in DTYPES:
            raise InputError(f"no dtype is called {name!r}: the dtypes are {', '.join(DTYPES)}")
    if repetitions is None:
        repetitions = QUICK_REPETITIONS if quick else DEFAULT_REPETITIONS
    for name, value in (("repetitions", repetitions), ("batch_per_rank", batch_per_rank)):
        if value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")
    if what == "growth" and shapes is not None:
        raise InputError("shapes are the layer's: growth has its own")
    if what in ("layer", "growth") and (profile is not None or compiled):
        raise InputError("profile and compile are the model's: ask for the model as well")
    growth = what == "growth"
    if not growth and (simulate is not None or parameters != DEFAULT_PARAMETERS):
        raise InputError(f"a simulation goes with growth, got {what!r}")
    if growth and backend is not None:
        raise InputError(f"growth is measured over gloo, got backend {backend!r}: leave --backend out")
    if backend == "fake" and what != "layer":
        raise InputError(f"DistributedDataParallel does not run over the fake backend: ask for layer, got {what!r}")
    if backend == "nccl" and profile is not None:
        raise InputError("a profile says how long ranks wait for each other, and over nccl there is but one here")
    where = "cpu" if growth else _device(device)
    settings = Settings(
        what=what,
        world_size=(
            check_growth(ranks, device, simulate, parameters) if growth else check_backend(backend, ranks, where)
        ),
        device=where,
        dtypes=("fp32",) if growth else tuple(dict.fromkeys(dtypes)),
        repetitions=repetitions,
        block_seconds=QUICK_BLOCK_SECONDS if quick else GROWTH_BLOCK_SECONDS if growth else BLOCK_SECONDS,
        shapes=None if shapes is None else tuple(shapes),
        batch_per_rank=batch_per_rank,
        side=QUICK_SIDE if quick else SIDE,
        width=QUICK_WIDTH if quick else WIDTH,
        compiled=compiled,
        profile=None if profile is None else str(profile),
        simulate=simulate,
        backend=backend,
    )
    if profile is not None:
        make_folder(profile)
    command = command_line()
    if growth:
        return run_growth(settings, parameters, quick, command, progress, keep)
    if backend in ("fake", "nccl"):
        return run_alone(settings, command, progress, keep)
    on_cpu = settings.device == "cpu"
    num_threads = 1 if on_cpu else torch.get_num_threads()
    ranks_of = ranks_for(settings.world_size, TIMEOUT_S, device=settings.device, cpu=on_cpu)
    with torch_threads(num_threads), ranks_of as on_ranks:
        return on_ranks(measure_on_rank, settings, command, progress, keep=keep)


def _device(asked: str | None) -> str:
    if asked not in (None, "cpu", "cuda"):
        raise InputError(f"device must be cpu or cuda, got {asked!r}")
    # Ranks of our own talk over gloo and can share a GPU; a launcher's talk over NCCL, which refuses that.
    there = torch.cuda.is_available() and (launched_world_size() is None or a_gpu_for_each_launched_rank())
    if asked == "cuda" and not there:
        short = "there is none" if not torch.cuda.is_available() else "the launcher started more ranks than there are"
        raise InputError(f"asked for cuda, but {short}: leave --device out, or ask for --device cpu")
    return asked or ("cuda" if there else "cpu")
