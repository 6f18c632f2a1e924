"""What a benchmark found, as plain frozen records that pickle, print and turn into JSON. Times are seconds a step."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from syncnorm.tools.bench.growth_records import Growth, Simulation
from syncnorm.tools.common.provenance import Hardware
from syncnorm.tools.common.records import Record


@dataclass(frozen=True)
class Settings:
    """What was asked for.

    Attributes:
        what: layer, model, all or growth.
        world_size: ranks; of growth, those of the largest world, and 0 where none is measured.
        device: cpu or cuda.
        dtypes: of the layer's input.
        repetitions: blocks of each contender.
        block_seconds: about how long a block of the slowest contender of a row takes.
        shapes: of the layer's input, those given by hand; None is the table of the device.
        batch_per_rank: images that a rank's model sees.
        side: pixels of an image, both ways.
        width: channels of the model's first stage.
        compiled: whether the compiled model was measured too.
        profile: folder of the traces, if any.
        simulate: ranks of the largest simulated world, if any.
        backend: gloo, nccl or fake where it was asked for.
    """

    what: str
    world_size: int
    device: str
    dtypes: tuple[str, ...]
    repetitions: int
    block_seconds: float
    shapes: tuple[tuple[int, ...], ...] | None
    batch_per_rank: int
    side: int
    width: int
    compiled: bool
    profile: str | None
    simulate: int | None = None
    backend: str | None = None


@dataclass(frozen=True)
class Timing:
    """One contender of a row, or one arm of the model; or the reason why it did not run, with nothing measured.

    Attributes:
        name: of the peer or the arm.
        not_run: why it did not run, else ``None``.
        seconds: a step's time on the slowest rank, by repetition.
        median: of ``seconds``.
        p25: its lower quartile.
        p75: its upper quartile.
        ratio_to: baseline -> median over the repetitions of this one's time / the baseline's in the same repetition.
    """

    name: str
    not_run: str | None = None
    seconds: tuple[float, ...] = ()
    median: float | None = None
    p25: float | None = None
    p75: float | None = None
    ratio_to: dict[str, float] | None = None

    def ratio(self, baseline: str) -> float | None:
        """``ratio_to[baseline]``; None where one of the two did not run."""
        return (self.ratio_to or {}).get(baseline)


@dataclass(frozen=True)
class Row:
    """One input of the layer benchmark, and what each peer took for a forward and a backward.

    Attributes:
        shape: of a rank's input.
        memory_format: contiguous or channels_last.
        dtype: of the input.
        num_bytes: of a rank's input.
        steps_per_block: of each peer.
        peers: their times.
        input_sets: pairs of input and gradient that the steps went through in turns.
        bandwidth_shares: peer -> what its step reaches of the copy bandwidth, if it reads and writes the tensors
            as often as a batch norm has to (``memory.PASSES``). Above 1 where tensors stay in the cache.
    """

    shape: tuple[int, ...]
    memory_format: str
    dtype: str
    num_bytes: int
    steps_per_block: int
    peers: tuple[Timing, ...]
    input_sets: int = 1
    bandwidth_shares: dict[str, float] = field(default_factory=dict)

    @property
    def num_elements(self) -> int:
        """Values of the input."""
        return math.prod(self.shape)

    @property
    def label(self) -> str:
        """The row in a few words."""
        return f"{'x'.join(map(str, self.shape))} {self.memory_format} {self.dtype}"

    def __getitem__(self, name: str) -> Timing:
        """The timing of the peer called ``name``."""
        return _named(self.peers, name)


@dataclass(frozen=True)
class LayerWait:
    """Milliseconds of a step that one synced layer spends in its exchanges."""

    layer: str
    forward_ms: float
    backward_ms: float


@dataclass(frozen=True)
class RankProfile:
    """Where the time of a profiled step went on one rank; means over the steps, in milliseconds.

    Attributes:
        rank: whose.
        steps: how many were profiled.
        step_ms: the whole step. ``norm_ms``, ``compute_ms`` and ``rest_ms`` add up to it.
        norm_ms: inside the exchanges of norm layers, mostly waiting for other ranks.
        compute_ms: from the start of the step until the last gradient is there, less ``norm_ms``.
        rest_ms: from then on: what DDP still waits for, and the optimiser.
        layers: in the order in which the forward meets them.
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
    """The training step of a residual network, by arm."""

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
class Figure:
    """One line of the summary: a ratio, and the most that it should be where there is a target.

    Attributes:
        what: the ratio.
        value: None where it was not measured; ``where`` then says why.
        limit: the target.
        where: which row, or how many.
        at_least: the target is the least that it should be.
    """

    what: str
    value: float | None
    limit: float | None = None
    where: str = ""
    at_least: bool = False

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None where there is none, or nothing was measured."""
        if self.limit is None or self.value is None:
            return None
        return self.value >= self.limit if self.at_least else self.value <= self.limit


@dataclass(frozen=True)
class Memory:
    """The memory that the layer's tensors are in.

    Attributes:
        copy_bandwidth: bytes a second that a copy of a large tensor reads and writes, on the slowest rank while all
            ranks copy.
        cache_bytes: of the largest cache before it; None where the system does not tell.
    """

    copy_bandwidth: float
    cache_bytes: int | None


@dataclass(frozen=True)
class Benchmark(Record):
    """A whole run: what was asked, where and when it ran, a row for each input, the model, and the summary.

    ``growth`` and ``simulation`` are there where they were asked for, and the others then empty. ``memory`` is there
    where layers were measured.
    """

    schema: ClassVar[str] = "syncnorm.bench"
    schema_version: ClassVar[int] = 1

    settings: Settings
    hardware: Hardware
    syncnorm_version: str
    torch_version: str
    python_version: str
    date: str
    command: str
    rows: tuple[Row, ...]
    model: ModelResult | None
    summary: tuple[Figure, ...]
    wall_seconds: float
    growth: Growth | None = None
    simulation: Simulation | None = None
    memory: Memory | None = None

    def to_dict(self) -> dict[str, Any]:
        """As of any `Record`; a figure of the summary says whether its target is met."""
        return {**super().to_dict(), "summary": [{**asdict(figure), "met": figure.met} for figure in self.summary]}


def _named(timings: tuple[Timing, ...], name: str) -> Timing:
    for timing in timings:
        if timing.name == name:
            return timing
    raise KeyError(name)
