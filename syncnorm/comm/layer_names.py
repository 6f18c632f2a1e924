"""The names by which ranks know a layer: where it stands in its model, and which of several models that is.

Two models of one architecture have layers of the same names. Were these all that ranks compare, a rank that runs the
two in another order than the others would mix their statistics, and nobody would notice.
"""

import copy
import gc
import weakref
from collections.abc import Container
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch.distributed as dist

_order = count()
_layers: "weakref.WeakSet[LayerName]" = weakref.WeakSet()
_world: "weakref.ref[dist.ProcessGroup] | None" = None
_job = 0


@dataclass(eq=False)
class Model:
    """Stands for a converted model, or for a layer that was built synced by itself.

    A copy is another model, as is one that is loaded from a pickle: the original may be there as well.

    Attributes:
        names: of its layers.
        made: before all models of this process with a larger number.
        job: counts the default groups of this process; 0 for a model that was made before there was one.
    """

    names: frozenset[str]
    made: int = field(init=False)
    job: int = field(init=False)

    def __post_init__(self) -> None:
        self.made, self.job = next(_order), _current_job()

    def __deepcopy__(self, memo: object) -> "Model":
        return Model(self.names)

    def __reduce__(self) -> tuple[type["Model"], tuple[frozenset[str]]]:
        return Model, (self.names,)


@dataclass(frozen=True, eq=False)
class LayerName:
    """A layer's name in its model; that of one that was built synced is its class and width.

    Copies and pickles of a model's names share one :class:`Model` again.
    """

    name: str
    model: Model
    built: bool = False
    group: Any = None  # that the layer is bound to; None is the default group

    def __post_init__(self) -> None:
        _layers.add(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> "LayerName":
        return LayerName(self.name, copy.deepcopy(self.model, memo), self.built, self.group)

    def __reduce__(self) -> tuple[type["LayerName"], tuple[str, Model, bool]]:
        return LayerName, (self.name, self.model, self.built)  # a file cannot hold a group

    def runs_over(self, group: dist.ProcessGroup) -> bool:
        """Whether the layer synchronizes over ``group``, as far as is known."""
        return self.group is group or (self.group is None and group is dist.group.WORLD)


class Numbers:
    """The numbers of models, and of layers that were built synced, for one process group.

    A model gets its number when one of them first runs, and with it all that have a layer of that name, in the order
    in which they were made: that is the same on all ranks, whichever of them a rank runs first. A model that is gone
    before that, made by one rank to look at, counts for nothing.
    """

    def __init__(self) -> None:
        self._last: dict[str, int] = {}
        self._numbers: dict[str, weakref.WeakKeyDictionary[Model, int]] = {}
        self._texts: weakref.WeakKeyDictionary[Model, str] = weakref.WeakKeyDictionary()
        self._built: dict[str, int] = {}

    def name(self, layer: LayerName, group: dist.ProcessGroup) -> str:
        """By what errors call ``layer``, and ranks compare it.

        Layers that were built synced are numbered as they first run, as a reader meets them; :meth:`built` has the
        other number.
        """
        if not layer.built:
            number = self._of(layer, group)
            return layer.name if number == 1 else f"{layer.name} of model {number}"
        if layer.model not in self._texts:
            text = f"{layer.name.split('(')[0]} no. {len(self._built) + 1}"
            self._texts[layer.model], self._built[text] = text, self._of(layer, group)
        return self._texts[layer.model]

    def built(self, name: str) -> int:
        """Which layer of its class and width was built as the one of that :meth:`name`; 0 for one of a model."""
        return self._built.get(name, 0)

    def _of(self, layer: LayerName, group: dist.ProcessGroup) -> int:
        numbers = self._numbers.setdefault(layer.name, weakref.WeakKeyDictionary())
        if layer.model not in numbers:
            if len(_waiting(layer, group, numbers)) > 1:
                gc.collect()  # ranks need not have collected the same of their garbage
            for model in sorted(_waiting(layer, group, numbers), key=lambda m: m.made):
                numbers[model] = self._last[layer.name] = self._last.get(layer.name, 0) + 1
        return numbers[layer.model]


def _waiting(layer: LayerName, group: dist.ProcessGroup, numbers: Container[Model]) -> set[Model]:
    """The models without a number that have a layer of that name over ``group``; that of ``layer`` is one."""
    jobs = {0, _current_job(), layer.model.job}
    others = (other for other in list(_layers) if other.name == layer.name and other.runs_over(group))
    return {layer.model} | {o.model for o in others if o.model not in numbers and o.model.job in jobs}


def _current_job() -> int:
    global _world, _job
    if not dist.is_initialized():
        return 0
    world = dist.group.WORLD
    if world is not None and (_world is None or _world() is not world):
        _world, _job = weakref.ref(world), _job + 1
    return _job
