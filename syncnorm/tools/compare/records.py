"""What a comparison found, as frozen records that pickle, print and turn into JSON.

Field names are keys of the JSON files that users keep: renaming one needs a new ``schema_version``.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any, ClassVar

from syncnorm.tools.common.provenance import Hardware
from syncnorm.tools.common.records import Record

# fp32 has a relative precision of 1.2e-7; summing a batch in a different order loses about one more digit. An arm
# that computes something different is above 1e-3.
ROUNDING = 1e-5


@dataclass(frozen=True)
class MaxError:
    """Largest difference of tensors from the reference: ``max|a - b|`` and ``max|a - b| / max|b|``."""

    max_abs: float
    max_rel: float


@dataclass(frozen=True)
class LayerParity:
    """The difference of one norm layer from the same layer of ``single``.

    Attributes:
        layer: its name in the model.
        output: for rank 0's part of the batch, in the forward of this step.
        gradients: of the layer's weight and bias, after DDP has averaged them.
        params: its weight and bias after the step.
        running_mean: after the step, on rank 0.
        running_var: likewise.
    """

    layer: str
    output: MaxError | None
    gradients: MaxError | None
    params: MaxError | None
    running_mean: MaxError | None
    running_var: MaxError | None


@dataclass(frozen=True)
class Parity:
    """The difference from ``single`` in optimizer step ``step``, over the whole model and for each layer.

    An error is ``None`` if it is not finite, or if one of the two arms does not have the tensors (a group norm has
    no running mean).

    Attributes:
        step: 1 is the first.
        output: the largest error over the norm layers.
        gradients: of all parameters, after DDP has averaged them over ranks.
        params: of all parameters, after the step.
        running_mean: of all norm layers, after the step.
        running_var: likewise.
        gradient_factor: least-squares factor between the gradients of ``single`` and those of this arm: 1 if both
            are the mean over the global batch, ``1 / world_size`` if the loss is a sum over samples, because DDP
            averages over ranks.
        note: the explanation of a factor other than 1, else ``None``.
        layers: in the order of `Task.norm_layers`.
    """

    step: int
    output: MaxError | None
    gradients: MaxError | None
    params: MaxError | None
    running_mean: MaxError | None
    running_var: MaxError | None
    gradient_factor: float | None = None
    note: str | None = None
    layers: tuple[LayerParity, ...] = ()

    @property
    def within_rounding(self) -> bool:
        """Whether outputs, weights and running statistics match those of ``single`` to fp32 rounding."""
        errors = (self.output, self.params, self.running_mean, self.running_var)
        return all(error is not None and error.max_rel <= ROUNDING for error in errors)

    @property
    def first_divergent_layer(self) -> str | None:
        """The first norm layer, in forward order, whose output or running statistics differ by more than rounding."""
        for layer in self.layers:
            errors = (layer.output, layer.running_mean, layer.running_var)
            if any(error is not None and error.max_rel > ROUNDING for error in errors):
                return layer.layer
        return None


@dataclass(frozen=True)
class Point:
    """A value at a training step; ``None`` if it is not finite."""

    step: int
    value: float | None


@dataclass(frozen=True)
class SeedResult:
    """One training run of an arm.

    Attributes:
        test_accuracy: share of the test targets that rank 0's model predicts correctly after the last step, in eval
            mode; ``None`` if the metric is the loss.
        test_loss: mean loss over the test samples, likewise.
        step_seconds: median time of a training step, without warm-up and data loading.
        train_loss: of the global batch, averaged over up to 50 intervals of steps; each is placed at its last step.
        test_accuracies: at a few steps including the last; empty if the metric is the loss.
        test_losses: at the same steps, for either metric.
    """

    seed: int
    test_accuracy: float | None
    test_loss: float | None
    step_seconds: float
    train_loss: tuple[Point, ...] = ()
    test_accuracies: tuple[Point, ...] = ()
    test_losses: tuple[Point, ...] = ()


@dataclass(frozen=True)
class CollectiveCount:
    """One kind of collective in one training step of rank 0.

    Attributes:
        op: ``all_reduce``, ``all_gather``, ``broadcast``, ...
        origin: ``"norm"`` if a normalization layer issued it, ``"ddp"`` if the wrapper did.
        calls: number of calls.
        payload_bytes: size of the tensors that rank 0 passed in, summed over the calls. The traffic on the network
            depends on the algorithm that the backend chooses.
    """

    op: str
    origin: str
    calls: int
    payload_bytes: int


@dataclass(frozen=True)
class Wait:
    """Time per step that a rank is blocked in collectives: mean over ranks and a few steps after the training.

    Attributes:
        norm_seconds: in the collectives of the norm layers.
        ddp_seconds: from the last gradient to the end of the backward, plus DDP's work before the forward (its
            broadcast of buffers).
        step_seconds: the whole step, in the same steps.
    """

    norm_seconds: float
    ddp_seconds: float
    step_seconds: float


@dataclass(frozen=True)
class PeakMemory:
    """Peak memory of a rank while an arm trains; the largest over ranks.

    Attributes:
        peak_bytes: bytes.
        measure: ``"rss growth"``: the peak resident memory of the process minus that at the start of the arm.
            ``"cuda allocated"``: ``torch.cuda.max_memory_allocated``.
    """

    peak_bytes: int
    measure: str


@dataclass(frozen=True)
class LayerDivergence:
    """How much the batch statistics of one norm layer differ between ranks; see `syncnorm.monitor.divergence`.

    Root mean square over a few batches; ``None`` if no channel varies.
    """

    layer: str
    mean: float | None
    var: float | None


@dataclass(frozen=True)
class ArmResult:
    """The measurements of one arm; or the reason why it did not run, with every figure ``None`` or empty.

    Attributes:
        name: the arm's name, as in ``--arms``.
        label: the name to print; it marks an arm that is emulated.
        ranks: number of processes that trained it.
        not_run: why it did not run, else ``None``.
        seeds: one run for each.
        step_seconds: median over the seeds of their median step times.
        samples_per_second: global batch / ``step_seconds``.
        collectives: those of one training step.
        wait: ``None`` in a single process, and on GPUs, where the host does not observe the waiting.
        memory: ``None`` if it cannot be measured.
        parity: difference from ``single`` at a few steps of the first seed, without dropout.
        wall_seconds: of the whole arm, including setup and evaluation.
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
    memory: PeakMemory | None = None
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
        """The final test result of each seed; ``metric`` is ``"accuracy"`` or ``"loss"``."""
        return tuple(run.test_accuracy if metric == "accuracy" else run.test_loss for run in self.seeds)

    def std(self, metric: str) -> float | None:
        """Standard deviation of `results`; ``None`` for fewer than two seeds, or if one is not finite."""
        values = [value for value in self.results(metric) if value is not None]
        return stdev(values) if len(values) == len(self.seeds) > 1 else None

    def calls(self, origin: str) -> int:
        """Number of collectives per step that ``origin`` (``"ddp"`` or ``"norm"``) issues."""
        return sum(count.calls for count in self.collectives or () if count.origin == origin)

    @property
    def payload_bytes(self) -> int:
        """Bytes per step that rank 0 passes to collectives."""
        return sum(count.payload_bytes for count in self.collectives or ())


@dataclass(frozen=True)
class CompareSettings:
    """Everything that determines what a comparison computes; equal settings give equal numbers.

    Attributes:
        parity_steps: the last step at which parity is measured, in a separate short run.
        seeds: of the initial weights and of the order of the data; every arm is trained once with each.
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
        """Samples per optimizer step, over all ranks."""
        return self.world_size * self.batch_per_rank


@dataclass(frozen=True)
class Task:
    """The model and what it is trained on.

    Attributes:
        model: ``package.module:function``, or a description of the default model.
        data: likewise.
        loss: likewise.
        metric: by which the arms are judged: ``"accuracy"`` if targets are class indices, else ``"loss"``.
        norm_layers: names of the model's batch norms, in the order in which the forward calls them.
        num_train: number of training samples.
        num_test: number of test samples, even if each has many labeled pixels.
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
class Comparison(Record):
    """A whole run: its settings, where and when it ran, and a result for each arm.

    Attributes:
        spread: divergence of the statistics between ranks, for each norm layer of the ``ddp`` arm's model after the
            first seed's training; empty without that arm.
        verdict: sentences, the most important first.
    """

    schema: ClassVar[str] = "syncnorm.compare"
    schema_version: ClassVar[int] = 2

    settings: CompareSettings
    task: Task
    hardware: Hardware
    syncnorm_version: str
    torch_version: str
    python_version: str
    date: str
    command: str
    arms: tuple[ArmResult, ...]
    spread: tuple[LayerDivergence, ...]
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
    """Comparisons that differ only in their batch per rank."""

    schema: ClassVar[str] = "syncnorm.compare.sweep"
    schema_version: ClassVar[int] = Comparison.schema_version

    comparisons: tuple[Comparison, ...]

    def to_dict(self) -> dict[str, Any]:
        """As for any `Record`; each comparison has its own schema as well."""
        return {**super().to_dict(), "comparisons": [comparison.to_dict() for comparison in self.comparisons]}


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return mean(known) if known and len(known) == len(values) else None
