"""The layer benchmark: a forward and a backward of each contender, on each row of the shape table.

On CPUs contenders are timed call by call, as in a model (see `calls`), and also in blocks of the same call. On
a GPU there are only blocks: inputs that take turns keep its caches cold, and the host launches ahead of it.

Times are also related to the bandwidth of the memory: how fast it is, and how much of it a cache hides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from syncnorm.tools.bench.calls import CallTimes, OtherWork, call_by_call, turns_to_fill
from syncnorm.tools.bench.contenders import BASELINES, CONTENDERS, LOCAL, Contender
from syncnorm.tools.bench.measure import WARM_UP, Step, block_length, interleaved, timings, warm_up
from syncnorm.tools.bench.records import BenchSettings, LayerRow, MemorySpeed
from syncnorm.tools.bench.shapes import DTYPES, FORMATS, Shape
from syncnorm.tools.common.ranks import Ranks

# Times that a batch norm reads or writes a tensor of the input's size. Forward: read for the statistics, read and
# written to normalize. Backward: x and dy read for the sums, both read and dx written to apply them.
PASSES = 8
# Size of the tensor that is copied: far larger than any cache, far smaller than any memory.
COPIED_BYTES = {"cuda": 2**30, "cpu": 2**27}
_COPIES_PER_BLOCK, _COPY_REPETITIONS = 3, 9
# The sets of inputs that take turns are together this much larger than the cache, so that it holds none of them when
# its turn comes.
CACHE_MULTIPLE = 4
# Enough for tensors so small that kernel launches are the whole cost.
MAX_SETS = 1024
# The L2 cache of an H100, where torch does not report the size.
_LARGE_L2_BYTES = 50 * 2**20


@dataclass
class LayerStep:
    """A forward and a backward of ``layer`` on the next of ``inputs``, pairs of x and dy.

    Collective: the collectives of the layer.
    """

    layer: nn.Module
    inputs: Sequence[tuple[Tensor, Tensor]]
    _parameters: list[nn.Parameter] = field(init=False)
    _after_backward: Callable[[], None] | None = field(init=False)
    _next: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._parameters = list(self.layer.parameters())
        self._after_backward = getattr(self.layer, "after_backward", None)

    def __call__(self) -> None:
        """Leaves the gradients in ``x.grad`` and in the ``grad`` of the parameters."""
        x, dy = self.inputs[self._next]
        # The gradient of the previous step too: this step can then use its memory, as in training.
        self.inputs[self._next - 1][0].grad = x.grad = None
        self._next = (self._next + 1) % len(self.inputs)
        for parameter in self._parameters:
            parameter.grad = None
        self.layer(x).backward(dy)
        if self._after_backward is not None:
            self._after_backward()


def make_inputs(
    shape: Shape, memory_format: str, dtype: str, device: torch.device, seed: int
) -> list[tuple[Tensor, Tensor]]:
    """Pairs of x, which requires a gradient, and dy, in the same memory format; enough pairs to outgrow the cache."""
    generator = torch.Generator(device).manual_seed(seed)

    def random() -> Tensor:
        x = torch.randn(shape, generator=generator, device=device).to(DTYPES[dtype])
        return x.contiguous(memory_format=FORMATS[memory_format])

    pair_bytes = 2 * math.prod(shape) * DTYPES[dtype].itemsize
    count = num_input_sets(pair_bytes, cache_to_outgrow(device))
    return [(random().requires_grad_(), random()) for _ in range(count)]


def measure_row(
    shape: Shape, memory_format: str, dtype: str, settings: BenchSettings, memory: MemorySpeed, ranks: Ranks
) -> LayerRow:
    """Times the contenders on one input, also relative to the time of a copy of it. Collective: all ranks."""
    inputs = make_inputs(shape, memory_format, dtype, ranks.device, seed=ranks.rank)
    steps, not_run = _build(CONTENDERS, shape, inputs, ranks.device)
    warm_up(steps)
    count, in_blocks = _timed_in_blocks(steps, settings, ranks)
    num_bytes = math.prod(shape) * DTYPES[dtype].itemsize
    blocks = timings(in_blocks, BASELINES, not_run)
    row = LayerRow(shape, memory_format, dtype, num_bytes, count, blocks, len(inputs))
    if ranks.device.type == "cpu":
        calls = _timed_by_call(steps, in_blocks, settings, ranks)
        peers = timings(calls.seconds, BASELINES, not_run)
        row = replace(row, peers=peers, blocks=blocks, calls=len(calls.seconds[LOCAL.name]), lateness=calls.lateness)
    copied_bytes = PASSES * num_bytes
    shares = {t.name: copied_bytes / t.median / memory.copy_bandwidth for t in row.peers if t.median is not None}
    return replace(row, bandwidth_shares=shares)


def _timed_in_blocks(
    steps: Mapping[str, Step], settings: BenchSettings, ranks: Ranks
) -> tuple[int, dict[str, tuple[float, ...]]]:
    """Steps per block, and the seconds per step of each contender by repetition."""
    # Without the local layer, which may be far faster than those that wait for each other.
    rough = interleaved({name: step for name, step in steps.items() if name != LOCAL.name}, ranks, 1, WARM_UP)
    slowest = max(times[0] for times in rough.values())
    count = ranks.share(block_length(slowest, settings.block_seconds))
    return count, interleaved(steps, ranks, settings.repetitions, count, before=steps)


def _timed_by_call(
    steps: Mapping[str, Step], in_blocks: Mapping[str, Sequence[float]], settings: BenchSettings, ranks: Ranks
) -> CallTimes:
    """As many calls as fill the time of the blocks, at least one per repetition."""
    work = OtherWork(ranks.rank)
    work_seconds = interleaved({"work": work}, ranks, 1, WARM_UP)["work"][0]
    turn_seconds = sum(median(times) + work_seconds for times in in_blocks.values())
    row_seconds = len(steps) * settings.repetitions * settings.block_seconds
    turns = ranks.share(turns_to_fill(row_seconds, turn_seconds, settings.repetitions))
    return call_by_call(steps, ranks, turns, work)


def _build(
    contenders: Sequence[Contender], shape: Shape, inputs: Sequence[tuple[Tensor, Tensor]], device: torch.device
) -> tuple[dict[str, LayerStep], dict[str, str]]:
    steps, not_run = {}, {}
    for contender in contenders:
        step = LayerStep(contender.build(len(shape), shape[1]).to(device), inputs)
        try:
            step()
        except ValueError as error:  # torch's layer on a CPU; it raises on every rank, before it communicates
            not_run[contender.name] = str(error)
        else:
            steps[contender.name] = step
    return steps, not_run


def measure_memory(ranks: Ranks) -> MemorySpeed:
    """Times copies on all ranks at the same time, as their steps run at the same time. Collective: all ranks."""
    source = torch.ones(COPIED_BYTES[ranks.device.type] // 4, device=ranks.device)
    target = torch.zeros_like(source)

    def copy() -> None:
        target.copy_(source)

    warm_up({"copy": copy})
    seconds = median(interleaved({"copy": copy}, ranks, _COPY_REPETITIONS, _COPIES_PER_BLOCK)["copy"])
    return MemorySpeed(2 * source.nbytes / seconds, cache_size(ranks.device))


def cache_size(device: torch.device) -> int | None:
    """Bytes of the largest cache of ``device``; None if the system does not report it."""
    if device.type == "cuda":
        return getattr(torch.cuda.get_device_properties(device), "L2_cache_size", None)
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((_in_bytes(path.read_text().strip()) for path in sizes), default=None)


def cache_to_outgrow(device: torch.device) -> int:
    """Bytes of the cache that must not hold the inputs: the L2 of a GPU, which other layers fill during training.

    0 on CPUs: activations that fit the cache of a core are there during training too.
    """
    return (cache_size(device) or _LARGE_L2_BYTES) if device.type == "cuda" else 0


def num_input_sets(set_bytes: int, cache_bytes: int) -> int:
    """Number of sets of inputs that take turns.

    Args:
        set_bytes: of one set.
        cache_bytes: of the cache that all of them together must outgrow; 0 for none.

    Example:
        >>> num_input_sets(30, cache_bytes=50), num_input_sets(30, cache_bytes=0)
        (7, 1)
    """
    return min(MAX_SETS, max(1, math.ceil(CACHE_MULTIPLE * cache_bytes / set_bytes)))


def _in_bytes(text: str) -> int:
    """Of ``"32768K"``, as Linux writes it."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    return int(text.rstrip("KMG")) * units.get(text[-1], 1)
