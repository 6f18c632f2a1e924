"""What a comparison found, as plain frozen records that pickle, print and turn into JSON."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any, ClassVar

from syncnorm.tools.common.provenance import Hardware
from syncnorm.tools.common.records import Record
from syncnorm.tools.compare.evidence import CollectiveCount, LayerSpread, Memory, Parity, SeedResult, Wait


@dataclass(frozen=True)
class Settings:
    """Everything that decides what a comparison computes; two equal settings give the same numbers.

    Attributes:
        parity_steps: the last step at which parity is measured, in a short run of its own.
        seeds: of the weights and of the order of the data; every arm is trained once with each.
        num_groups: of the group norm arm.
    """

    arms: tuple[str, ...]
    world_size: int
    batch_per_rank: int
    steps: int
    parity_steps: int
    seeds: tuple[int, ...]
    lr: float
    momentum: float
    num_groups: int

    @property
    def global_batch(self) -> int:
        """Samples that one optimiser step sees, over all ranks."""
        return self.world_size * self.batch_per_rank


@dataclass(frozen=True)
class Task:
    """What was learned, by which model.

    Attributes:
        model: where it comes from: ``package.module:function``, or a name for the model of the demo.
        data: likewise.
        loss: likewise.
        metric: ``"accuracy"`` where targets are class indices, else ``"loss"``: what the arms are judged by.
        norm_layers: names of the model's batch norms, in the order in which a forward comes to them.
        num_test: samples, also where each is judged in many pixels.
    """

    model: str
    data: str
    loss: str
    metric: str
    num_parameters: int
    norm_layers: tuple[str, ...]
    num_train: int
    num_test: int


@dataclass(frozen=True)
class ArmResult:
    """One arm, trained and measured; or the reason why it did not run, with every figure ``None`` or empty.

    Attributes:
        name: the arm's name, as ``--arms`` takes it.
        label: the name to print; it says where an arm is an emulation.
        ranks: processes that trained it.
        not_run: why it did not run, else ``None``.
        seeds: a run each.
        step_seconds: median over the seeds of each one's median step.
        samples_per_second: global batch / ``step_seconds``.
        collectives: what one training step sends.
        wait: ``None`` in one process, and on GPUs, where the host does not see the waiting.
        memory: ``None`` where it cannot be measured.
        parity: difference to ``single`` at a few steps of the first seed, dropout switched off.
        wall_seconds: the whole arm, set-up and evaluation included.
    """

    name: str
    label: str
    ranks: int
    not_run: str | None = None
    seeds: tuple[SeedResult, ...] = ()
    step_seconds: float | None = None
    samples_per_second: float | None = None
    collectives: tuple[CollectiveCount, ...] | None = None
    wait: Wait | None = None
    memory: Memory | None = None
    parity: tuple[Parity, ...] = ()
    wall_seconds: float | None = None

    @property
    def test_accuracy(self) -> float | None:
        """Mean over the seeds."""
        return _mean([run.test_accuracy for run in self.seeds])

    @property
    def test_loss(self) -> float | None:
        """Mean over the seeds."""
        return _mean([run.test_loss for run in self.seeds])

    def results(self, metric: str) -> tuple[float | None, ...]:
        """What each seed ended with: ``"accuracy"`` or ``"loss"``."""
        return tuple(run.test_accuracy if metric == "accuracy" else run.test_loss for run in self.seeds)

    def spread_over_seeds(self, metric: str) -> float | None:
        """Standard deviation of `results`; ``None`` of fewer than two, or of one that is not finite."""
        values = [value for value in self.results(metric) if value is not None]
        return stdev(values) if len(values) == len(self.seeds) > 1 else None

    def calls(self, origin: str) -> int:
        """Collectives a step that ``origin`` (``"ddp"`` or ``"norm"``) issues."""
        return sum(count.calls for count in self.collectives or () if count.origin == origin)

    @property
    def payload_bytes(self) -> int:
        """Bytes a step that rank 0 hands to collectives."""
        return sum(count.payload_bytes for count in self.collectives or ())


@dataclass(frozen=True)
class Comparison(Record):
    """A whole run: what was asked, where and when it ran, and a result for each arm.

    Attributes:
        spread: of the statistics between ranks, for each norm layer of the ``ddp`` arm's model after the first
            seed's training; empty without that arm.
        verdict: sentences, the most important first.
    """

    schema: ClassVar[str] = "syncnorm.compare"
    schema_version: ClassVar[int] = 2

    settings: Settings
    task: Task
    hardware: Hardware
    syncnorm_version: str
    torch_version: str
    python_version: str
    date: str
    command: str
    arms: tuple[ArmResult, ...]
    spread: tuple[LayerSpread, ...]
    wall_seconds: float
    verdict: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> ArmResult:
        """The result of the arm called ``name``."""
        for result in self.arms:
            if result.name == name:
                return result
        raise KeyError(name)


@dataclass(frozen=True)
class Sweep(Record):
    """Comparisons that differ in their batch per rank alone."""

    schema: ClassVar[str] = "syncnorm.compare.sweep"
    schema_version: ClassVar[int] = Comparison.schema_version

    comparisons: tuple[Comparison, ...]

    def to_dict(self) -> dict[str, Any]:
        """As of any `Record`; so is each comparison, with its own schema."""
        return {**super().to_dict(), "comparisons": [comparison.to_dict() for comparison in self.comparisons]}


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return mean(known) if known and len(known) == len(values) else None
