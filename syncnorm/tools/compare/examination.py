"""Looks at the user's model, data and loss before anything is started, and says in one line what does not fit."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import UninitializedParameter
from torch.utils.data import IterableDataset

from syncnorm.conversion.convert import convert
from syncnorm.errors import InputError
from syncnorm.tools.common.data import collate, digits
from syncnorm.tools.common.errors import one_line
from syncnorm.tools.compare.problem import Problem
from syncnorm.tools.compare.records import Task

# Groups as Wu and He (2018) use them, and fewer where the model is narrower.
MOST_GROUPS = 32


def examine(problem: Problem, world_size: int, batch_per_rank: int, seed: int) -> tuple[Task, int]:
    """What is to be learned, and the number of groups that group norm can have in every layer.

    Raises:
        InputError: a function raises, or returns what cannot be compared.
    """
    model = _model(problem, seed)
    train, test = _datasets(problem)
    global_batch = world_size * batch_per_rank
    if len(train) < global_batch:
        raise InputError(
            f"{world_size} ranks of {batch_per_rank} samples make a global batch of {global_batch}, more than the "
            f"{len(train)} training samples of {problem.data_name}: take a smaller --batch-per-rank"
        )
    for name, data in (("training", train), ("test", test)):
        _check_item(data, f"the {name} data of {problem.data_name}")
    norms = {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm)}
    metric, order = _try_out(problem, model, norms, [test[i] for i in range(min(2, len(test)))])
    _try_training(problem, model, collate([train[i] for i in range(global_batch)]))
    task = Task(
        model=problem.model_name,
        data=problem.data_name,
        loss=problem.loss_name,
        metric=metric,
        num_parameters=sum(p.numel() for p in model.parameters()),
        norm_layers=tuple(dict.fromkeys((*order, *norms))),
        num_train=len(train),
        num_test=len(test),
    )
    return task, _num_groups([m.num_features for m in norms.values()])


def _model(problem: Problem, seed: int) -> nn.Module:
    name = problem.model_name
    with _told_of(f"{name}() raised"):
        model: Any = problem.build(seed)
    if not isinstance(model, nn.Module):
        raise InputError(f"{name}() must return a torch.nn.Module, got {_kind(model)}")
    if any(isinstance(p, UninitializedParameter) for p in model.parameters()):
        raise InputError(f"{name}() returns a model with lazy layers: make one forward in it, to give them weights")
    if not any(isinstance(m, _BatchNorm) for m in model.modules()):
        raise InputError(
            f"{name}() returns a {type(model).__name__} without batch norm layers: there is nothing to synchronise"
        )
    with _told_of(f"{name}() raised when it was called again:"):
        again: Any = problem.build(seed)
    _check_anew(name, model, again)
    return convert(model, to="batch")


def _check_anew(name: str, model: nn.Module, again: nn.Module) -> None:
    """Every arm and every seed begins with a model of its own, from the weights of its seed."""
    first, second = dict(model.state_dict()), dict(again.state_dict())
    if {id(m) for m in model.modules()} & {id(m) for m in again.modules()} or any(
        a is b for a in model.parameters() for b in again.parameters()
    ):
        raise InputError(
            f"{name}() returns the same model again: build a new one in it, for every arm trains its own"
        )
    if first.keys() != second.keys() or not all(_equal(a, second[key]) for key, a in first.items()):
        raise InputError(
            f"{name}() returns other weights after the same seed: draw them from torch's, NumPy's or Python's "
            f"global generator"
        )


def _equal(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return True  # extra state, of any kind
    return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def _datasets(problem: Problem) -> tuple[Any, Any]:
    name = problem.data_name
    # The demo's own data lacks nothing but an extra, and whoever called says which.
    with nullcontext() if problem.make_datasets is digits else _told_of(f"{name}() raised"):
        pair = problem.datasets()
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        got = f"{len(pair)} of them" if isinstance(pair, tuple | list) else _kind(pair)
        raise InputError(f"{name}() must return two datasets, (training, test), got {got}")
    for each, data in zip(("training", "test"), pair, strict=True):
        if isinstance(data, IterableDataset) or not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
            raise InputError(
                f"the {each} data of {name} is not map-style: it needs __len__ and __getitem__, got {_kind(data)}"
            )
        if len(data) == 0:
            raise InputError(f"the {each} data of {name} is empty")
    return pair[0], pair[1]


def _check_item(data: Any, name: str) -> None:
    with _told_of(f"{name}: item 0 raised"):
        item = data[0]
    if not isinstance(item, tuple | list) or len(item) != 2:
        got = f"{len(item)} of something" if isinstance(item, tuple | list) else _kind(item)
        raise InputError(f"{name}: items must be (input, target), got {got}")
    with _told_of(f"{name}: items do not make a batch:"):
        inputs, _ = collate([item])
    if not isinstance(inputs, Tensor):
        raise InputError(f"{name}: the input of an item must be a tensor, got {_kind(item[0])}")


@torch.no_grad()
def _try_out(problem: Problem, model: nn.Module, norms: dict[str, Any], items: list[Any]) -> tuple[str, list[str]]:
    order: list[str] = []
    hooks = [m.register_forward_pre_hook(lambda *_, name=name: order.append(name)) for name, m in norms.items()]
    inputs, targets = collate(items)
    with _told_of(f"{problem.model_name}: the model raised on inputs of shape {tuple(inputs.shape)}:"):
        outputs = model.eval()(inputs)
    for hook in hooks:
        hook.remove()
    if problem.loss_name == "cross-entropy" and not (isinstance(targets, Tensor) and isinstance(outputs, Tensor)):
        raise InputError(
            "cross-entropy needs tensors of outputs and targets: give a loss with --loss module:function"
        )
    if problem.loss_name == "cross-entropy" and targets.dtype != torch.int64:
        raise InputError(
            f"cross-entropy needs targets of int64 class indices, got {_shape(targets)}: give a loss with "
            f"--loss module:function"
        )
    shown = f"outputs {_shape(outputs)} and targets {_shape(targets)}"
    with _told_of(f"the loss {problem.loss_name} raised on {shown}:"):
        loss: Any = problem.loss(outputs, targets)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise InputError(f"the loss {problem.loss_name} must return a scalar tensor, got {_shape(loss)}")
    return "accuracy" if _are_classes(outputs, targets) else "loss", order


def _try_training(problem: Problem, model: nn.Module, batch: Any) -> None:
    """A training step of a copy: a model may return something else in training."""
    inputs, targets = batch
    try:
        outputs = copy.deepcopy(model).train()(inputs)
    except ValueError:  # too few values for a norm, perhaps: each arm says for itself whether it can run
        return
    except Exception as error:  # the user's own code runs here
        shape = tuple(inputs.shape)
        raise InputError(
            f"{problem.model_name}: the model raised in training, on inputs of shape {shape}: {one_line(error)}"
        ) from error
    with _told_of(f"the loss {problem.loss_name} raised in training, on outputs {_shape(outputs)}:"):
        loss = problem.loss(outputs, targets)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise InputError(f"the loss {problem.loss_name} must return a scalar tensor in training, got {_shape(loss)}")
    with _told_of(f"the backward of the loss {problem.loss_name} raised:"):
        loss.backward()  # type: ignore[no-untyped-call]


def _are_classes(outputs: Any, targets: Any) -> bool:
    return (
        isinstance(outputs, Tensor)
        and isinstance(targets, Tensor)
        and targets.dtype == torch.int64
        and outputs.dim() >= 2
        and outputs.shape[1] > 1  # one logit has no largest
        and targets.shape == (outputs.shape[0], *outputs.shape[2:])
    )


def _num_groups(widths: list[int]) -> int:
    """The most groups, a power of two, that leave two channels a group in every layer; one where none does."""
    groups = MOST_GROUPS
    while groups > 1 and any(width % groups or width < 2 * groups for width in widths):
        groups //= 2
    return groups


@contextmanager
def _told_of(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the user's own code runs here
        raise InputError(f"{what} {one_line(error)}") from error


def _kind(value: Any) -> str:
    return "None" if value is None else type(value).__name__


def _shape(value: Any) -> str:
    if not isinstance(value, Tensor):
        return _kind(value)
    return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
