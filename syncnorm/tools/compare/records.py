"""What a comparison found, as frozen records that pickle, print and turn into JSON.

Field names are keys of the JSON files that users keep: renaming one needs a new ``schema_version``.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any, ClassVar

from syncnorm.tools.common.provenance import Hardware
from syncnorm.tools.common.records import Record
from syncnorm.tools.compare.old_records import from_version_2

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
        output: for rank 0's part of the batch, or its first micro-batch, in the forward of this step.
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
        """Whether outputs, updates and running statistics match those of ``single`` to fp32 rounding."""
        errors = (self.output, self.update, self.running_mean, self.running_var)
        return all(error is not None and error.max_rel <= ROUNDING for error in errors)

    @property
    def update(self) -> MaxError | None:
        """The error of the weights, or of the gradients if that is smaller.

        Adam turns a gradient that is rounding alone, as of a bias before a batch norm, into a whole step.
        """
        known = [error for error in (self.params, self.gradients) if error is not None]
        return min(known, key=lambda error: error.max_rel, default=None)

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
        test_metric: the metric of the task on the test samples, of rank 0's model after the last step in eval mode;
            ``None`` if it is not finite.
        test_loss: mean loss over the test samples, of the same model; ``None`` too if it has no loss in eval mode.
        step_seconds: median time of a training step, without warm-up and data loading.
        train_loss: of the global batch, averaged over up to 50 intervals of steps; each is placed at its last step.
        test_metrics: at a few steps including the last.
        test_losses: at the same steps.
        units: the metric of each unit of the test set (`MetricInfo.units`) after the last step, as a text of
            `tools.common.units`; empty if it is not known.
    """

    seed: int
    test_metric: float | None
    test_loss: float | None
    step_seconds: float
    train_loss: tuple[Point, ...] = ()
    test_metrics: tuple[Point, ...] = ()
    test_losses: tuple[Point, ...] = ()
    units: str = ""


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
class StepTime:
    """Duration of a training step and its parts: means over ranks and over the middle half of the timed steps.

    Attributes:
        seconds: the whole step.
        norm_seconds: waiting in the collectives of the norm layers.
        ddp_seconds: waiting from the last gradient to the end of the backward, plus DDP's work before the forward
            (its broadcast of buffers). Both are ``None`` on GPUs, where the host does not observe the waiting.
    """

    seconds: float
    norm_seconds: float | None = None
    ddp_seconds: float | None = None

    @property
    def work_seconds(self) -> float:
        """The rest of the step."""
        return self.seconds - (self.norm_seconds or 0.0) - (self.ddp_seconds or 0.0)


@dataclass(frozen=True)
class StepRatio:
    """Step time of an arm relative to that of ``ddp``; the arms took turns, so that a slow moment slows both.

    Attributes:
        ratio: median over the rounds.
        low: lower end of the 95 % interval of the median (order statistics).
        high: its upper end.
        rounds: how many times each arm took its turn.
    """

    ratio: float
    low: float
    high: float
    rounds: int


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
        step: time of a training step.
        cost: the same relative to the ``ddp`` arm; ``None`` without that arm.
        collectives: those of one training step.
        memory: ``None`` if it cannot be measured.
        parity: difference from ``single`` at a few steps of the first seed, without dropout.
        wall_seconds: of the whole arm, including setup and evaluation.
    """

    name: str
    label: str
    ranks: int
    not_run: str | None = None
    seeds: tuple[SeedResult, ...] = ()
    step: StepTime | None = None
    cost: StepRatio | None = None
    collectives: tuple[CollectiveCount, ...] | None = None
    memory: PeakMemory | None = None
    parity: tuple[Parity, ...] = ()
    wall_seconds: float | None = None

    @property
    def test_metric(self) -> float | None:
        """Mean over the seeds; ``None`` if one of them is not finite."""
        values = self.results
        known = [value for value in values if value is not None]
        return mean(known) if known and len(known) == len(values) else None

    @property
    def results(self) -> tuple[float | None, ...]:
        """The final value of the metric for each seed."""
        return tuple(run.test_metric for run in self.seeds)

    @property
    def diverged(self) -> bool:
        """Whether the training loss or the result of a seed is not finite: the largest of NaN logits is class 0."""
        return any(
            run.test_metric is None or bool(run.train_loss and run.train_loss[-1].value is None) for run in self.seeds
        )

    @property
    def std(self) -> float | None:
        """Standard deviation of `results`; ``None`` for fewer than two seeds, or if one is not finite."""
        values = [value for value in self.results if value is not None]
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
        accumulate: batches per optimizer step, whose gradients are accumulated.
        eval_batch: test samples per forward.
        num_workers: processes that load the training data of a rank; 0 loads it in the rank itself.
        amp: dtype of autocast, ``"bfloat16"`` or ``"float16"``; empty for full precision. Parity is measured in full
            precision.
        margin: largest difference that does not matter, see `tools.common.decision.Rule`; ``None`` for the default.
        budget_seconds: seeds were added until the results decided or this time was over; ``None`` if the number of
            seeds was given.
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
    accumulate: int = 1
    eval_batch: int = 1
    num_workers: int = 0
    amp: str = ""
    margin: float | None = None
    budget_seconds: float | None = None

    @property
    def global_batch(self) -> int:
        """Samples whose statistics a synced layer combines: those of one forward of all ranks."""
        return self.world_size * self.batch_per_rank


@dataclass(frozen=True)
class MetricInfo:
    """By what the arms are judged.

    Attributes:
        name: ``"accuracy"``, ``"loss"``, or the name of the user's metric.
        higher_is_better: its direction.
        share: whether its values are between 0 and 1; they are shown as percentages.
        units: what `SeedResult.units` has a value for: ``"samples"``; ``"batches"`` of the evaluation for a loss;
            ``"groups"`` of samples, each left out once, for a metric of the whole test set (the jackknife).
    """

    name: str = "accuracy"
    higher_is_better: bool = True
    share: bool = True
    units: str = "samples"


@dataclass(frozen=True)
class Task:
    """The model and what it is trained on.

    Attributes:
        model: ``package.module:function``, or a description of the default model.
        data: likewise.
        loss: likewise.
        metric: by which the arms are judged.
        norm_layers: names of the model's batch norms, in the order in which the forward calls them.
        num_train: number of training samples.
        num_test: number of test samples, even if each has many labeled pixels.
        step: name of the function that computes the loss of a batch; empty by default, as are the next two.
        collate: of the one that makes a batch of samples.
        optimizer: of the one that builds the optimizer.
    """

    model: str
    data: str
    loss: str
    metric: MetricInfo
    num_parameters: int
    norm_layers: tuple[str, ...]
    num_train: int
    num_test: int
    step: str = ""
    collate: str = ""
    optimizer: str = ""


@dataclass(frozen=True)
class Decision:
    """How one arm compares with another, by the rule of `tools.common.decision`.

    Attributes:
        arm: name of the arm.
        other: name of the arm that it is compared with.
        kind: ``"better"``, ``"worse"``, ``"equivalent"`` or ``"undecided"``: what the interval says.
        difference: mean over seeds, positive if ``arm`` is better; in percentage points, or in units of the metric.
        by_seed: the difference for each seed.
        low: lower end of the confidence interval; ``None`` if one seed or one test sample gives no interval.
        high: its upper end.
        margin: differences up to this one do not matter.
        confidence: of the interval: 0.95, and more for seeds that were added until the results decided.
        more_seeds: how many more seeds would decide if the spread stays as it is; 0 if it is decided, ``None`` if
            seeds alone would not.
        more_samples: how many more test samples would, with the same seeds; 0 and ``None`` as for the seeds.
    """

    arm: str
    other: str
    kind: str
    difference: float
    by_seed: tuple[float, ...]
    low: float | None
    high: float | None
    margin: float
    confidence: float
    more_seeds: int | None
    more_samples: int | None


@dataclass(frozen=True)
class Comparison(Record):
    """A whole run: its settings, where and when it ran, and a result for each arm.

    Attributes:
        spread: divergence of the statistics between ranks, for each norm layer of the ``ddp`` arm's model after the
            first seed's training; empty without that arm.
        looks: how many times the results were judged while seeds were added; 0 if the number of seeds was given.
        decisions: the comparisons of arms that the verdict is based on.
        verdict: sentences, the most important first.
    """

    schema: ClassVar[str] = "syncnorm.compare"
    schema_version: ClassVar[int] = 3

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
    looks: int = 0
    decisions: tuple[Decision, ...] = ()
    verdict: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Comparison:
        """As for any `Record`; also reads version 2, which had no results of single samples."""
        if (data.get("schema"), data.get("schema_version")) == (cls.schema, 2):
            data = from_version_2(data)
        return super().from_dict(data)

    def __getitem__(self, name: str) -> ArmResult:
        """The result of the arm called ``name``."""
        for result in self.arms:
            if result.name == name:
                return result
        raise KeyError(name)

    def samples_per_second(self, arm: ArmResult) -> float | None:
        """Samples of a training step / its time, without data loading; ``None`` if ``arm`` was not timed."""
        settings = self.settings
        return settings.global_batch * settings.accumulate / arm.step.seconds if arm.step else None


@dataclass(frozen=True)
class Sweep(Record):
    """Comparisons that differ only in their batch per rank."""

    schema: ClassVar[str] = "syncnorm.compare.sweep"
    schema_version: ClassVar[int] = Comparison.schema_version

    comparisons: tuple[Comparison, ...]

    def to_dict(self) -> dict[str, Any]:
        """As for any `Record`; each comparison has its own schema as well."""
        return {**super().to_dict(), "comparisons": [comparison.to_dict() for comparison in self.comparisons]}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Sweep:
        """As for any `Record`; also reads version 2."""
        if data.get("schema") != cls.schema or data.get("schema_version") not in (2, cls.schema_version):
            return super().from_dict(data)  # which raises
        return cls(tuple(Comparison.from_dict(each) for each in data["comparisons"]))
