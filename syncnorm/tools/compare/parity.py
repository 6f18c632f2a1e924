"""How much an arm differs from ``single`` in a training step, for each norm layer and over the whole model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from syncnorm.tools.compare.records import LayerParity, MaxError, Parity

Tensors = Mapping[str, Tensor]
KINDS = ("output", "gradients", "params", "running_mean", "running_var")
# Gradients that consist of rounding alone have no meaningful relative error. So the error of a layer is relative to
# the layer's largest value, or to this share of the model's largest value if that is larger.
MIN_REFERENCE_SHARE = 1e-3
# Gradients are equal up to a factor if the factor and the remaining relative error are this accurate.
FACTOR_TOLERANCE = 1e-3
# The first steps, in which an error has not been amplified yet, and some later ones.
_STEPS = (1, 2, 5, 10, 20, 50, 100, 200, 500)

_DROPOUTS = {
    F.dropout,
    F.dropout1d,
    F.dropout2d,
    F.dropout3d,
    F.alpha_dropout,
    F.feature_alpha_dropout,
    torch.dropout,
}


def steps_to_measure(parity_steps: int) -> tuple[int, ...]:
    """1, 2, 5, 10, ... up to and including ``parity_steps``."""
    return (*(step for step in _STEPS if step < parity_steps), parity_steps)


class WithoutDropout(TorchFunctionMode):
    """Makes dropout return its input, because ranks and the single process would drop different values."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs every other function unchanged."""
        kwargs = kwargs or {}
        if func in _DROPOUTS:
            return args[0] if args else kwargs["input"]
        return func(*args, **kwargs)


@dataclass(frozen=True)
class Snapshot:
    """Copies of a model's tensors in one step, by kind and then by name; outputs by the name of the norm layer."""

    tensors: dict[str, dict[str, Tensor]]

    def of_layer(self, kind: str, layer: str) -> Tensors:
        """The output, or the parameters or buffers of ``kind``, of one norm layer."""
        tensors = self.tensors[kind].items()
        return {n: t for n, t in tensors if (n if kind == "output" else n.rpartition(".")[0]) == layer}


@dataclass
class Recorder:
    """Takes snapshots of a model in training: `recording` around the forward, `record_gradients`, then `snapshot`.

    Args:
        model: without its wrapper.
        layers: names of its norm layers.
        part: (numerator, denominator) of the first part of each batch, whose outputs are copied.
    """

    model: nn.Module
    layers: Sequence[str]
    part: tuple[int, int]
    _outputs: dict[str, Tensor] = field(default_factory=dict)
    _gradients: dict[str, Tensor] = field(default_factory=dict)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Copies the outputs of the norm layers inside the block, which runs forward and backward."""
        self._outputs.clear()
        modules = dict(self.model.named_modules())  # an arm of the user's may have removed a layer
        hooks = [
            modules[name].register_forward_hook(
                lambda module, args, output, name=name: self._record_output(name, output)
            )
            for name in self.layers
            if name in modules
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def record_gradients(self) -> None:
        """Copies the gradients; to be called between backward and update."""
        named = self.model.named_parameters()
        self._gradients = {name: _copy(p.grad) for name, p in named if p.grad is not None}

    def snapshot(self) -> Snapshot:
        """The copies, and the weights and running statistics; to be called after the update."""
        buffers = dict(self.model.named_buffers())
        return Snapshot(
            {
                "output": dict(self._outputs),
                "gradients": self._gradients,
                "params": {name: _copy(p) for name, p in self.model.named_parameters()},
                **{
                    kind: {name: _copy(b) for name, b in buffers.items() if name.rpartition(".")[2] == kind}
                    for kind in KINDS[3:]
                },
            }
        )

    def _record_output(self, name: str, output: Tensor) -> None:
        # Only the first call of a layer counts. It is copied now because the next layer may work in place.
        if name not in self._outputs:
            part, whole = self.part
            self._outputs[name] = _copy(output[: len(output) * part // whole])


def measure_parity(step: int, ours: Snapshot, reference: Snapshot, layers: Sequence[str], world_size: int) -> Parity:
    """The differences between two snapshots of the same step."""
    floors = {kind: MIN_REFERENCE_SHARE * _max_abs(reference.tensors[kind].values()) for kind in KINDS}
    by_layer = tuple(
        LayerParity(
            layer,
            *(
                _max_error(*_common_rows(ours.of_layer(kind, layer), reference.of_layer(kind, layer)), floors[kind])
                for kind in KINDS
            ),
        )
        for layer in layers
    )
    errors = {kind: _max_error(ours.tensors[kind], reference.tensors[kind]) for kind in KINDS[1:]}
    # Models that both have no running statistics do not differ in them.
    errors |= {
        kind: MaxError(0.0, 0.0) for kind in KINDS[3:] if not ours.tensors[kind] and not reference.tensors[kind]
    }
    outputs = [each.output for each in by_layer if each.output is not None]
    factor = _gradient_factor(ours.tensors["gradients"], reference.tensors["gradients"])
    return Parity(
        step,
        output=max(outputs, key=lambda error: error.max_rel, default=None),
        gradients=errors["gradients"],
        params=errors["params"],
        running_mean=errors["running_mean"],
        running_var=errors["running_var"],
        gradient_factor=factor,
        note=_note(ours.tensors["gradients"], reference.tensors["gradients"], factor, world_size),
        layers=by_layer,
    )


def _common_rows(ours: Tensors, reference: Tensors) -> tuple[Tensors, Tensors]:
    """Both cut to the first rows that both have: samples may differ in their rows, such as frames or boxes."""
    rows = {name: min(len(t), len(reference[name])) for name, t in ours.items() if name in reference and t.dim()}
    return tuple({n: t[: rows.get(n)] if t.dim() else t for n, t in each.items()} for each in (ours, reference))  # type: ignore[return-value]  # two


def _note(ours: Tensors, reference: Tensors, factor: float | None, world_size: int) -> str | None:
    if factor is None or world_size < 2 or abs(factor * world_size - 1) > FACTOR_TOLERANCE:
        return None
    # Different statistics also change the direction of the gradients: then the factor explains nothing.
    rest = _max_error({name: tensor.double() * world_size for name, tensor in ours.items()}, reference)
    if rest is None or rest.max_rel > FACTOR_TOLERANCE:
        return None
    return (
        f"gradients are 1/{world_size} of those of single: the loss is a sum over samples, and DDP averages "
        f"gradients over {world_size} ranks. Use the mean in the loss, or {world_size} times the learning rate"
    )


def _max_error(ours: Tensors, reference: Tensors, min_reference: float = 0.0) -> MaxError | None:
    if not ours or ours.keys() != reference.keys() or any(ours[n].shape != b.shape for n, b in reference.items()):
        return None
    # In fp64, so that the subtraction adds no rounding to the rounding that is measured.
    max_abs = max(float((ours[n].double() - b.double()).abs().max()) for n, b in reference.items() if b.numel())
    scale = max(_max_abs(reference.values()), min_reference)
    max_rel = max_abs / scale if scale else float(max_abs > 0)
    return MaxError(max_abs, max_rel) if isfinite(max_abs) and isfinite(max_rel) else None


def _max_abs(tensors: Iterable[Tensor]) -> float:
    return max((float(t.double().abs().max()) for t in tensors if t.numel()), default=0.0)


def _gradient_factor(ours: Tensors, reference: Tensors) -> float | None:
    if not reference or ours.keys() != reference.keys():
        return None
    projection = sum(float((ours[n].double() * b.double()).sum()) for n, b in reference.items())
    squared_norm = sum(float(b.double().square().sum()) for b in reference.values())
    factor = projection / squared_norm if squared_norm else float("nan")
    return factor if isfinite(factor) else None


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone()
