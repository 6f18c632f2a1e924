"""The results of a benchmark, as plain frozen records that pickle, print and convert to JSON.

Times are seconds per step. The names of fields are the keys of the JSON file, whose format is older than some names
in the code: ``peers`` are the contenders of a row, ``growth`` is the scaling with the world size, and the contender
"local + collectives" is called ``floor``.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from syncnorm.tools.bench.old_records import from_version_1, from_version_2
from syncnorm.tools.bench.scaling_records import Scaling, Simulation
from syncnorm.tools.bench.shapes import DTYPES, Shape
from syncnorm.tools.common.nets import RESNET_WIDTH
from syncnorm.tools.common.provenance import Hardware
from syncnorm.tools.common.records import Record

# `BenchSettings.what` of the scaling benchmark, in files.
SCALING = "growth"
DEFAULT_REPETITIONS = 15
DEFAULT_BATCH_PER_RANK = 8


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """What was requested.

    Attributes:
        what: layer, model, all (the two of them) or growth.
        world_size: number of ranks. For growth, the largest measured world, and 0 if none is measured.
        device: cpu or cuda.
        dtypes: of the layer's input.
        repetitions: blocks per contender, and the fewest single calls of a layer.
        block_seconds: approximate duration of a block of the slowest contender.
        shapes: of the layer's input, if given by the user; None is the table of the device.
        batch_per_rank: images per rank and step of the model.
        side: height and width of an image in pixels.
        width: channels of the model's first stage.
        compiled: whether the compiled model was measured too.
        profile: folder of the traces, if any.
        simulate: number of ranks of the largest simulated world, if any.
        backend: gloo, nccl or fake, if given by the user.
    """

    what: str
    world_size: int
    device: str
    dtypes: tuple[str, ...] = tuple(DTYPES)
    repetitions: int = DEFAULT_REPETITIONS
    # Long compared with a clock's resolution and a barrier's jitter, short compared with other load on the machine.
    block_seconds: float = 0.02
    shapes: tuple[Shape, ...] | None = None
    batch_per_rank: int = DEFAULT_BATCH_PER_RANK
    side: int = 64
    width: int = RESNET_WIDTH
    compiled: bool = False
    profile: str | None = None
    simulate: int | None = None
    backend: str | None = None


@dataclass(frozen=True)
class Timing:
    """One contender of a row or one arm of the model; or the reason why it did not run, without measurements.

    Attributes:
        name: of the contender or the arm.
        not_run: why it did not run, else ``None``.
        seconds: time of a step per repetition: of a block on the slowest rank, or of a single call from the arrival
            of the last rank until all ranks are done.
        median: of ``seconds``.
        p25: its lower quartile.
        p75: its upper quartile.
        ratio_to: baseline -> median over the repetitions of (time of this one / time of the baseline).
    """

    name: str
    not_run: str | None = None
    seconds: tuple[float, ...] = ()
    median: float | None = None
    p25: float | None = None
    p75: float | None = None
    ratio_to: dict[str, float] | None = None

    def ratio(self, baseline: str) -> float | None:
        """``ratio_to[baseline]``; None if one of the two did not run."""
        return (self.ratio_to or {}).get(baseline)


@dataclass(frozen=True)
class LayerRow:
    """One input of the layer benchmark, and the time that each contender needed for a forward and a backward.

    Attributes:
        shape: of the input of a rank.
        memory_format: contiguous or channels_last.
        dtype: of the input.
        num_bytes: of the input of a rank.
        steps_per_block: of each contender.
        peers: the timings of the contenders: call by call, with other work in between, or in blocks if ``calls`` is
            0.
        input_sets: number of (input, gradient) pairs that the steps cycle through.
        bandwidth_shares: contender -> fraction of the copy bandwidth that its step reaches, assuming that it reads
            and writes the tensors as often as a batch norm has to (``layers.PASSES``). Above 1 if tensors stay in
            the cache.
        calls: single calls per contender; 0 on GPUs.
        lateness: seconds between the arrivals of the first and the last rank at a call, median; None without calls,
            or if the ranks run on several hosts.
        blocks: the timings of the contenders in blocks; empty if ``calls`` is 0.
    """

    shape: Shape
    memory_format: str
    dtype: str
    num_bytes: int
    steps_per_block: int
    peers: tuple[Timing, ...]
    input_sets: int = 1
    bandwidth_shares: dict[str, float] = field(default_factory=dict)
    calls: int = 0
    lateness: float | None = None
    blocks: tuple[Timing, ...] = ()

    @property
    def num_elements(self) -> int:
        """Number of elements of the input."""
        return math.prod(self.shape)

    @property
    def label(self) -> str:
        """Shape, memory format and dtype in one line."""
        return row_label(self.shape, self.memory_format, self.dtype)

    def __getitem__(self, name: str) -> Timing:
        """The timing of the contender called ``name``."""
        return _named(self.peers, name)

    def in_blocks(self, name: str) -> Timing | None:
        """The timing in blocks of the contender called ``name``; None if it was not also timed call by call."""
        return _named(self.blocks, name) if self.blocks else None


def row_label(shape: Shape, memory_format: str, dtype: str) -> str:
    """For example ``"64x512 contiguous fp32"``."""
    return f"{'x'.join(map(str, shape))} {memory_format} {dtype}"


@dataclass(frozen=True)
class ExchangeSituation:
    """The time of one gather of a layer, in one situation.

    Attributes:
        name: of the situation.
        seconds: from the arrival of the last rank until all ranks have the result, per call.
        median: of ``seconds``.
        p90: their 90th percentile.
    """

    name: str
    seconds: tuple[float, ...]
    median: float
    p90: float


@dataclass(frozen=True)
class ExchangeLatency:
    """The exchange benchmark: how long ranks take to exchange the statistics of a small layer.

    Attributes:
        num_bytes: of the statistics of a rank.
        transport: how they travel: a value of ``SYNCNORM_TRANSPORT`` other than auto.
        situations: what the ranks did before each call.
    """

    num_bytes: int
    transport: str
    situations: tuple[ExchangeSituation, ...]

    def __getitem__(self, name: str) -> ExchangeSituation:
        """The situation called ``name``."""
        for situation in self.situations:
            if situation.name == name:
                return situation
        raise KeyError(name)


@dataclass(frozen=True)
class LayerWait:
    """Milliseconds per step that one synchronized layer spends in its exchanges."""

    layer: str
    forward_ms: float
    backward_ms: float


@dataclass(frozen=True)
class RankProfile:
    """How the time of a profiled step is spent on one rank: means over the steps, in milliseconds.

    Attributes:
        rank: the rank.
        steps: number of profiled steps.
        step_ms: the whole step, which is the sum of ``norm_ms``, ``compute_ms`` and ``rest_ms``.
        norm_ms: inside the exchanges of norm layers, mostly waiting for other ranks.
        compute_ms: from the start of the step until the last gradient is ready, without ``norm_ms``.
        rest_ms: after the last gradient: the remaining wait of DDP, and the optimizer.
        layers: in the order of the forward.
    """

    rank: int
    steps: int
    step_ms: float
    norm_ms: float
    compute_ms: float
    rest_ms: float
    layers: tuple[LayerWait, ...]


@dataclass(frozen=True)
class ModelResult:
    """The training step of a residual network, per arm."""

    name: str
    num_parameters: int
    num_norm_layers: int
    input_shape: tuple[int, ...]
    steps_per_block: int
    arms: tuple[Timing, ...]
    profile: tuple[RankProfile, ...] = ()

    def __getitem__(self, name: str) -> Timing:
        """The timing of the arm called ``name``."""
        return _named(self.arms, name)


@dataclass(frozen=True)
class SummaryLine:
    """One line of the summary: a figure, mostly a ratio, and its target if it has one.

    Attributes:
        what: the figure.
        value: None if it was not measured; ``where`` then says why.
        limit: the target.
        where: the row, or the number of rows.
        at_least: whether the target is a lower bound; otherwise it is an upper bound.
    """

    what: str
    value: float | None
    limit: float | None = None
    where: str = ""
    at_least: bool = False

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None without a target or a measurement."""
        if self.limit is None or self.value is None:
            return None
        return self.value >= self.limit if self.at_least else self.value <= self.limit


@dataclass(frozen=True)
class MemorySpeed:
    """The memory that holds the tensors of the layer.

    Attributes:
        copy_bandwidth: bytes per second that a copy of a large tensor reads and writes, on the slowest rank while
            all ranks copy.
        cache_bytes: size of the largest cache in front of it; None if the system does not report it.
    """

    copy_bandwidth: float
    cache_bytes: int | None


@dataclass(frozen=True)
class Benchmark(Record):
    """A whole run: what was requested, where and when it ran, a row per input, the model, and the summary.

    ``growth`` and ``simulation`` are set by the scaling benchmark, which leaves the other results empty. ``memory``
    is set if layers were measured, ``exchange`` if their ranks communicate on CPUs.

    ``load_before`` and ``load_after`` are the processes that were running or ready to run on the host of rank 0, in
    the mean over the last minute (``os.getloadavg``): before the measurement, those of others; after it, the ranks
    too. None where the system does not report it.
    """

    schema: ClassVar[str] = "syncnorm.bench"
    schema_version: ClassVar[int] = 3

    settings: BenchSettings
    hardware: Hardware
    syncnorm_version: str
    torch_version: str
    python_version: str
    date: str
    command: str
    rows: tuple[LayerRow, ...]
    model: ModelResult | None
    summary: tuple[SummaryLine, ...]
    wall_seconds: float
    growth: Scaling | None = None
    simulation: Simulation | None = None
    memory: MemorySpeed | None = None
    exchange: ExchangeLatency | None = None
    load_before: float | None = None
    load_after: float | None = None

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Benchmark:
        """As for any `Record`; also reads versions 1 and 2."""
        if data.get("schema") == cls.schema:
            # What `to_dict` adds follows from the other fields.
            lines = [{name: line[name] for name in line if name != "met"} for line in data.get("summary", ())]
            data = {**data, "summary": lines}
            if data.get("schema_version") == 1:
                data = from_version_1(data)
            if data.get("schema_version") == 2:
                data = from_version_2(data)
        return super().from_dict(data)

    def to_dict(self) -> dict[str, Any]:
        """As for any `Record`; each line of the summary also says whether its target is met."""
        return {**super().to_dict(), "summary": [{**asdict(line), "met": line.met} for line in self.summary]}


def _named(timings: tuple[Timing, ...], name: str) -> Timing:
    for timing in timings:
        if timing.name == name:
            return timing
    raise KeyError(name)
