"""How far an arm is from ``single`` in a training step: norm layer by norm layer, and over the whole model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from syncnorm.tools.compare.evidence import Gap, LayerParity, Parity

Tensors = Mapping[str, Tensor]
KINDS = ("output", "gradients", "params", "running_mean", "running_var")
# A layer that hardly matters has gradients of rounding alone: they count as this share of the model's largest.
LEAST_SHARE = 1e-3
# Gradients that are those of ``single`` but for a factor.
SAME = 1e-3
# The first steps, in which an error has had no time to grow, and a few of those in which it does.
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
    """1, 2, 5, 10, ... and ``parity_steps`` itself, the last."""
    return (*(step for step in _STEPS if step < parity_steps), parity_steps)


class WithoutDropout(TorchFunctionMode):
    """While active, dropout passes its input on: ranks and the single process would drop different values."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs all else as it is."""
        kwargs = kwargs or {}
        if func in _DROPOUTS:
            return args[0] if args else kwargs["input"]
        return func(*args, **kwargs)


@dataclass(frozen=True)
class Snapshot:
    """Copies of a model's tensors in one step, by kind and then by name; ``output`` by norm layer."""

    tensors: dict[str, dict[str, Tensor]]

    def of(self, kind: str, layer: str) -> Tensors:
        """Those of ``kind`` that belong to one norm layer itself."""
        mine = {n: t for n, t in self.tensors[kind].items() if n.rpartition(".")[0] == layer}
        return {n: t for n, t in self.tensors[kind].items() if n == layer} if kind == "output" else mine


@dataclass
class Recorder:
    """Takes snapshots of a model that is being trained: outputs in the forward, the rest when asked.

    Args:
        model: without its wrapper.
        layers: names of its norm layers.
        rows: (numerator, denominator) of the part of a batch whose outputs are kept: its first rows.
    """

    model: nn.Module
    layers: Sequence[str]
    rows: tuple[int, int]
    _outputs: dict[str, Tensor] = field(default_factory=dict)
    _gradients: dict[str, Tensor] = field(default_factory=dict)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Around forward and backward."""
        self._outputs.clear()
        hooks = [
            self.model.get_submodule(name).register_forward_hook(
                lambda module, args, output, name=name: self._keep(name, output)
            )
            for name in self.layers
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def keep_gradients(self) -> None:
        """Between backward and update."""
        named = self.model.named_parameters()
        self._gradients = {name: _copy(p.grad) for name, p in named if p.grad is not None}

    def snapshot(self) -> Snapshot:
        """After the update."""
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

    def _keep(self, name: str, output: Tensor) -> None:
        # The first call's, where a layer is called more than once. A copy now: what follows may work in place.
        if name not in self._outputs:
            part, whole = self.rows
            self._outputs[name] = _copy(output[: len(output) * part // whole])


def parity(step: int, ours: Snapshot, reference: Snapshot, layers: Sequence[str], world_size: int) -> Parity:
    """What two snapshots of the same step are apart."""
    largest = {kind: _largest(reference.tensors[kind].values()) for kind in KINDS}
    by_layer = tuple(
        LayerParity(
            layer,
            *(_gap(ours.of(kind, layer), reference.of(kind, layer), LEAST_SHARE * largest[kind]) for kind in KINDS),
        )
        for layer in layers
    )
    gaps = {kind: _gap(ours.tensors[kind], reference.tensors[kind]) for kind in KINDS[1:]}
    # A model that keeps no running statistics has none that differ.
    gaps |= {kind: Gap(0.0, 0.0) for kind in KINDS[3:] if not ours.tensors[kind] and not reference.tensors[kind]}
    outputs = [each.output for each in by_layer if each.output is not None]
    factor = _factor(ours.tensors["gradients"], reference.tensors["gradients"])
    return Parity(
        step,
        output=max(outputs, key=lambda gap: gap.max_rel, default=None),
        gradients=gaps["gradients"],
        params=gaps["params"],
        running_mean=gaps["running_mean"],
        running_var=gaps["running_var"],
        gradient_factor=factor,
        note=_note(ours.tensors["gradients"], reference.tensors["gradients"], factor, world_size),
        layers=by_layer,
    )


def _note(ours: Tensors, reference: Tensors, factor: float | None, world_size: int) -> str | None:
    if factor is None or world_size < 2 or abs(factor * world_size - 1) > SAME:
        return None
    # Other statistics turn gradients as well as scale them: then nothing is explained by a factor.
    rest = _gap({name: tensor.double() * world_size for name, tensor in ours.items()}, reference)
    if rest is None or rest.max_rel > SAME:
        return None
    return (
        f"gradients are 1/{world_size} of single's: the loss adds up its samples, and DDP averages gradients over "
        f"{world_size} ranks. Take the mean in the loss, or {world_size} times the learning rate"
    )


def _gap(ours: Tensors, reference: Tensors, least: float = 0.0) -> Gap | None:
    if not ours or ours.keys() != reference.keys() or any(ours[n].shape != b.shape for n, b in reference.items()):
        return None
    # fp64, so that the subtraction itself adds no rounding to the rounding that is measured.
    difference = max(float((ours[n].double() - b.double()).abs().max()) for n, b in reference.items() if b.numel())
    largest = max(_largest(reference.values()), least)
    relative = difference / largest if largest else float(difference > 0)
    return Gap(difference, relative) if isfinite(difference) and isfinite(relative) else None


def _largest(tensors: Any) -> float:
    return max((float(t.double().abs().max()) for t in tensors if t.numel()), default=0.0)


def _factor(ours: Tensors, reference: Tensors) -> float | None:
    if not reference or ours.keys() != reference.keys():
        return None
    along = sum(float((ours[n].double() * b.double()).sum()) for n, b in reference.items())
    length = sum(float(b.double().square().sum()) for b in reference.values())
    factor = along / length if length else float("nan")
    return factor if isfinite(factor) else None


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone()
