"""The names by which ranks identify a layer: its name in the model, and which of several models it belongs to.

Two models of one architecture have layers of the same names. If ranks compared only these, a rank that runs the two
models in another order than the other ranks would silently mix their statistics.
"""

import copy
import gc
import weakref
from collections.abc import Container
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch.distributed as dist

from syncnorm._torch_versions import is_initialized

_creation_order = count()
_layers: "weakref.WeakSet[LayerName]" = weakref.WeakSet()
_world: "weakref.ref[dist.ProcessGroup] | None" = None
_job = 0


@dataclass(eq=False)
class Model:
    """Identifies a converted model, or a single layer that was constructed as a synced one.

    A copy is another model, and so is one that was loaded from a pickle, because the original may still exist.

    Attributes:
        names: of its layers.
        created: increases with each model that this process creates.
        job: counts the default groups of this process; 0 for a model that was created before the first one.
    """

    names: frozenset[str]
    created: int = field(init=False)
    job: int = field(init=False)

    def __post_init__(self) -> None:
        self.created, self.job = next(_creation_order), _current_job()

    def __deepcopy__(self, memo: object) -> "Model":
        return Model(self.names)

    def __reduce__(self) -> tuple[type["Model"], tuple[frozenset[str]]]:
        return Model, (self.names,)


@dataclass(frozen=True, eq=False)
class LayerName:
    """A layer's name and its model.

    If the names of a model are copied or pickled together, the results share one :class:`Model` too.

    Attributes:
        name: the layer's name in its model; class and width for a layer that was constructed as a synced one.
        model: the model.
        built: whether the layer was constructed as a synced one.
        group: the process group that the layer is bound to; None is the default group.
    """

    name: str
    model: Model
    built: bool = False
    group: dist.ProcessGroup | None = None

    def __post_init__(self) -> None:
        _layers.add(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> "LayerName":
        return LayerName(self.name, copy.deepcopy(self.model, memo), self.built, self.group)

    def __reduce__(self) -> tuple[type["LayerName"], tuple[str, Model, bool]]:
        return LayerName, (self.name, self.model, self.built)  # a process group cannot be pickled

    def runs_over(self, group: dist.ProcessGroup) -> bool:
        """Whether the layer synchronizes over ``group``, as far as this rank knows."""
        return self.group is group or (self.group is None and group is dist.group.WORLD)


class ModelNumbers:
    """Numbers the models, and the layers that were constructed as synced ones, of one process group.

    When the first layer of a name runs, all models that have a layer of that name get their numbers, in order of
    creation. That order is the same on all ranks, whichever model a rank runs first. A model that no longer exists
    then, for example one that a single rank created for inspection, gets no number.
    """

    def __init__(self) -> None:
        self._last: dict[str, int] = {}
        self._numbers: dict[str, weakref.WeakKeyDictionary[Model, int]] = {}
        self._built_names: weakref.WeakKeyDictionary[Model, str] = weakref.WeakKeyDictionary()
        self._built_numbers: dict[str, int] = {}

    def name(self, layer: LayerName, group: dist.ProcessGroup) -> str:
        """The name of ``layer`` for comparison between ranks and for error messages.

        Layers that were constructed as synced ones are numbered in order of their first forwards, because that is how
        a reader meets them. :meth:`built` returns their number in order of construction.
        """
        if not layer.built:
            number = self._number(layer, group)
            return layer.name if number == 1 else f"{layer.name} of model {number}"
        if layer.model not in self._built_names:
            name = f"{layer.name.split('(')[0]} no. {len(self._built_numbers) + 1}"
            self._built_names[layer.model], self._built_numbers[name] = name, self._number(layer, group)
        return self._built_names[layer.model]

    def built(self, name: str) -> int:
        """The number, in order of construction, of the layer with that :meth:`name`; 0 for a layer of a model."""
        return self._built_numbers.get(name, 0)

    def _number(self, layer: LayerName, group: dist.ProcessGroup) -> int:
        numbers = self._numbers.setdefault(layer.name, weakref.WeakKeyDictionary())
        if layer.model not in numbers:
            if len(_unnumbered(layer, group, numbers)) > 1:
                gc.collect()  # garbage may have been collected on some ranks only
            for model in sorted(_unnumbered(layer, group, numbers), key=lambda m: m.created):
                numbers[model] = self._last[layer.name] = self._last.get(layer.name, 0) + 1
        return numbers[layer.model]


def _unnumbered(layer: LayerName, group: dist.ProcessGroup, numbers: Container[Model]) -> set[Model]:
    """The models without a number that have a layer of that name over ``group``, including the model of ``layer``."""
    jobs = {0, _current_job(), layer.model.job}
    others = (other for other in list(_layers) if other.name == layer.name and other.runs_over(group))
    return {layer.model} | {o.model for o in others if o.model not in numbers and o.model.job in jobs}


def _current_job() -> int:
    global _world, _job
    if not is_initialized():
        return 0
    world = dist.group.WORLD
    if world is not None and (_world is None or _world() is not world):
        _world, _job = weakref.ref(world), _job + 1
    return _job
