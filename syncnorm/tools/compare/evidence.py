"""The evidence about one arm, as plain frozen records: parity, curves, collectives, waiting, memory, spread."""

from __future__ import annotations

from dataclasses import dataclass

# fp32 carries 1.2e-7 of relative precision; sums over a batch in another order lose a digit of it. What an
# arm computes differently shows up above 1e-3.
ROUNDING = 1e-5


@dataclass(frozen=True)
class Gap:
    """How far tensors are from the reference: ``max|a - b|`` and ``max|a - b| / max|b|``."""

    max_abs: float
    max_rel: float


@dataclass(frozen=True)
class LayerParity:
    """One norm layer's difference to the same layer of ``single``.

    Attributes:
        layer: its name in the model.
        output: of rank 0's part of the batch, in the forward of this step.
        gradients: of the layer's own weight and bias, after DDP has averaged them.
        params: its weight and bias after the step.
        running_mean: after the step; rank 0's.
        running_var: likewise.
    """

    layer: str
    output: Gap | None
    gradients: Gap | None
    params: Gap | None
    running_mean: Gap | None
    running_var: Gap | None


@dataclass(frozen=True)
class Parity:
    """Difference to ``single`` in optimiser step ``step``, over the whole model and layer by layer.

    A kind that does not exist on both sides (a group norm has no running mean), or that is not finite, is ``None``.

    Attributes:
        step: 1 is the first.
        output: the largest over the norm layers.
        gradients: of all parameters, after DDP has averaged them over ranks.
        params: all of them, after the step.
        running_mean: of all norm layers, after the step.
        running_var: likewise.
        gradient_factor: the number that brings ``single``'s gradients closest to this arm's: 1 where both have
            the mean over the global batch, ``1 / world_size`` where a loss adds up samples and DDP then averages
            over ranks.
        note: what explains a factor other than 1, else ``None``.
        layers: in the order of `Task.norm_layers`.
    """

    step: int
    output: Gap | None
    gradients: Gap | None
    params: Gap | None
    running_mean: Gap | None
    running_var: Gap | None
    gradient_factor: float | None = None
    note: str | None = None
    layers: tuple[LayerParity, ...] = ()

    @property
    def within_rounding(self) -> bool:
        """Whether outputs, weights and running statistics are those of ``single`` to fp32 rounding."""
        gaps = (self.output, self.params, self.running_mean, self.running_var)
        return all(gap is not None and gap.max_rel <= ROUNDING for gap in gaps)

    @property
    def departs_at(self) -> str | None:
        """The first norm layer, in forward order, whose output or running statistics are beyond rounding."""
        for layer in self.layers:
            gaps = (layer.output, layer.running_mean, layer.running_var)
            if any(gap is not None and gap.max_rel > ROUNDING for gap in gaps):
                return layer.layer
        return None


@dataclass(frozen=True)
class Point:
    """A value at a step of the training; ``None`` where it is not finite."""

    step: int
    value: float | None


@dataclass(frozen=True)
class SeedResult:
    """One training run of an arm.

    Attributes:
        test_accuracy: share of the test targets that rank 0's model gets right after the last step, in eval mode;
            ``None`` where the metric is the loss.
        test_loss: mean of the loss over the test samples, likewise.
        step_seconds: median time of a training step, warm-up and the loading of data excluded.
        train_loss: the global batch's, as the mean of up to 50 stretches of steps; each stands at its last step.
        test_accuracies: at a few steps, the last among them; empty where the metric is the loss.
        test_losses: likewise, for every metric.
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
        origin: ``"norm"`` where a normalisation layer asked for it, ``"ddp"`` where the wrapper did.
        calls: how often.
        payload_bytes: size of the tensors that rank 0 handed in, summed over the calls. What the wire
            carries depends on the algorithm that the backend picks.
    """

    op: str
    origin: str
    calls: int
    payload_bytes: int


@dataclass(frozen=True)
class Wait:
    """How long a step stands still for others: mean over ranks and a few steps after the training.

    Attributes:
        norm_seconds: blocked in the norm layers' collectives.
        ddp_seconds: from the last gradient to the end of the backward, plus what DDP does before the forward
            (its broadcast of buffers).
        step_seconds: the whole step, in the same steps.
    """

    norm_seconds: float
    ddp_seconds: float
    step_seconds: float


@dataclass(frozen=True)
class Memory:
    """Peak memory of a rank while an arm trains; the largest over ranks.

    Attributes:
        peak_bytes: how much.
        measure: ``"rss growth"``: the process's peak resident memory less that at the arm's start.
            ``"cuda allocated"``: ``torch.cuda.max_memory_allocated``.
    """

    peak_bytes: int
    measure: str


@dataclass(frozen=True)
class LayerSpread:
    """The divergence of the ranks' statistics in one norm layer, see `syncnorm.monitor.divergence.RankDivergence`.

    Root mean square over a few batches; ``None`` where no channel varies.
    """

    layer: str
    mean: float | None
    var: float | None
