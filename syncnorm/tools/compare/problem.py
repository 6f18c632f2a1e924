"""What the arms train: a model, data and a loss, and the checks of them before anything is started."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import UninitializedParameter
from torch.utils.data import IterableDataset

from syncnorm.conversion.convert import convert
from syncnorm.errors import InputError
from syncnorm.tools.common.data import collate, digits, seed_everything
from syncnorm.tools.common.errors import one_line
from syncnorm.tools.common.nets import build_plain_net
from syncnorm.tools.compare.records import CompareSettings, MetricInfo, Task

Loss = Callable[[Any, Any], Tensor]

# Wu and He (2018) use 32 groups; a narrower model has fewer.
MAX_GROUPS = 32


@dataclass(frozen=True)
class Problem:
    """Functions that every rank calls itself, so that only their names are sent to the ranks.

    Attributes:
        build_model: () -> the model with its batch norms, in its initial state.
        make_datasets: () -> (training data, test data), map-style, of (input, target).
        loss: (output, target) -> a scalar, the mean over the samples, as DDP takes the mean over ranks.
        model_name: for the record, like the other names.
    """

    build_model: Callable[[], nn.Module]
    make_datasets: Callable[[], Any]
    loss: Loss
    model_name: str
    data_name: str
    loss_name: str

    @classmethod
    def of(
        cls, build_model: Callable[[], nn.Module] | None, datasets: Callable[[], Any] | None, loss: Loss | None
    ) -> Problem:
        """The user's functions; the defaults are a small CNN, scikit-learn's digits and cross-entropy."""
        return cls(
            build_model or build_plain_net,
            datasets or digits,
            loss or F.cross_entropy,
            _name(build_model) if build_model else "a small CNN",
            _name(datasets) if datasets else "scikit-learn's digits",
            _name(loss) if loss else "cross-entropy",
        )

    def build(self, seed: int) -> Any:
        """The return value of the user's function, with the weights of ``seed``, the same on every rank."""
        with torch.random.fork_rng(devices=[]):
            seed_everything(seed)
            return self.build_model()

    def model(self, seed: int) -> nn.Module:
        """The model with plain batch norms."""
        model: nn.Module = convert(self.build(seed), to="batch")
        return model

    def datasets(self) -> Any:
        """Training and test data, the same on every rank and for every seed."""
        with torch.random.fork_rng(devices=[]):
            seed_everything(0)
            return self.make_datasets()


def _name(function: Callable[..., Any]) -> str:
    """``package.module:function``, as on a command line."""
    return f"{function.__module__}:{getattr(function, '__qualname__', type(function).__qualname__)}"


def check_problem(problem: Problem, settings: CompareSettings) -> tuple[Task, int]:
    """Runs model, data and loss once in this process.

    Returns:
        A description of the problem, and the number of groups that group norm can have in every layer.

    Raises:
        InputError: a function raises, or returns something that cannot be compared.
    """
    model = _checked_model(problem, settings.seeds[0])
    train, test = _checked_datasets(problem)
    world_size, batch_per_rank, global_batch = settings.world_size, settings.batch_per_rank, settings.global_batch
    if len(train) < global_batch:
        raise InputError(
            f"{world_size} ranks with {batch_per_rank} samples each make a global batch of {global_batch}, more than "
            f"the {len(train)} training samples of {problem.data_name}: use a smaller --batch-per-rank"
        )
    for name, data in (("training", train), ("test", test)):
        _check_item(data, f"the {name} data of {problem.data_name}")
    norms = {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm)}
    metric, order = _try_evaluation(problem, model, norms, [test[i] for i in range(min(2, len(test)))])
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


def _checked_model(problem: Problem, seed: int) -> nn.Module:
    name = problem.model_name
    with _raising_input_error(f"{name}() raised"):
        model: Any = problem.build(seed)
    if not isinstance(model, nn.Module):
        raise InputError(f"{name}() must return a torch.nn.Module, got {_type_name(model)}")
    if any(isinstance(p, UninitializedParameter) for p in model.parameters()):
        raise InputError(f"{name}() returns a model with lazy layers: run one forward in it to initialize them")
    if not any(isinstance(m, _BatchNorm) for m in model.modules()):
        raise InputError(
            f"{name}() returns a {type(model).__name__} without batch norm layers: there is nothing to synchronize"
        )
    with _raising_input_error(f"{name}() raised when called a second time:"):
        again: Any = problem.build(seed)
    _check_rebuilt(name, model, again)
    return convert(model, to="batch")


def _check_rebuilt(name: str, model: nn.Module, again: nn.Module) -> None:
    """Every arm and seed trains a separate model, with the initial weights of its seed."""
    first, second = dict(model.state_dict()), dict(again.state_dict())
    if {id(m) for m in model.modules()} & {id(m) for m in again.modules()} or any(
        a is b for a in model.parameters() for b in again.parameters()
    ):
        raise InputError(f"{name}() returns the same model again: it must build a new one, as every arm trains one")
    if first.keys() != second.keys() or not all(_equal(a, second[key]) for key, a in first.items()):
        raise InputError(
            f"{name}() returns different weights for the same seed: draw them from the global generator of torch, "
            f"NumPy or Python"
        )


def _equal(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return True  # extra state, of any type
    return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def _checked_datasets(problem: Problem) -> tuple[Any, Any]:
    name = problem.data_name
    # The default data raises only if scikit-learn is missing, which the caller reports with the extra to install.
    with nullcontext() if problem.make_datasets is digits else _raising_input_error(f"{name}() raised"):
        pair = problem.datasets()
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        got = f"{len(pair)} values" if isinstance(pair, tuple | list) else _type_name(pair)
        raise InputError(f"{name}() must return two datasets, (training, test), got {got}")
    for each, data in zip(("training", "test"), pair, strict=True):
        if isinstance(data, IterableDataset) or not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
            raise InputError(
                f"the {each} data of {name} is not map-style: it needs __len__ and __getitem__, "
                f"got {_type_name(data)}"
            )
        if len(data) == 0:
            raise InputError(f"the {each} data of {name} is empty")
    return pair[0], pair[1]


def _check_item(data: Any, name: str) -> None:
    with _raising_input_error(f"{name}: item 0 raised"):
        item = data[0]
    if not isinstance(item, tuple | list) or len(item) != 2:
        got = f"{len(item)} values" if isinstance(item, tuple | list) else _type_name(item)
        raise InputError(f"{name}: items must be (input, target), got {got}")
    with _raising_input_error(f"{name}: items cannot be collated into a batch:"):
        inputs, _ = collate([item])
    if not isinstance(inputs, Tensor):
        raise InputError(f"{name}: the input of an item must be a tensor, got {_type_name(item[0])}")


@torch.no_grad()
def _try_evaluation(
    problem: Problem, model: nn.Module, norms: dict[str, Any], items: list[Any]
) -> tuple[MetricInfo, list[str]]:
    """The metric, and the names of ``norms`` in the order in which a forward in eval mode calls them."""
    order: list[str] = []
    hooks = [m.register_forward_pre_hook(lambda *_, name=name: order.append(name)) for name, m in norms.items()]
    inputs, targets = collate(items)
    with _raising_input_error(f"{problem.model_name}: the model raised on inputs of shape {tuple(inputs.shape)}:"):
        outputs = model.eval()(inputs)
    for hook in hooks:
        hook.remove()
    if problem.loss_name == "cross-entropy" and not (isinstance(targets, Tensor) and isinstance(outputs, Tensor)):
        raise InputError(
            "cross-entropy needs outputs and targets that are tensors: pass a loss with --loss module:function"
        )
    if problem.loss_name == "cross-entropy" and targets.dtype != torch.int64:
        raise InputError(
            f"cross-entropy needs targets that are int64 class indices, got {_shape(targets)}: pass a loss with "
            f"--loss module:function"
        )
    arguments = f"outputs {_shape(outputs)} and targets {_shape(targets)}"
    with _raising_input_error(f"the loss {problem.loss_name} raised on {arguments}:"):
        loss: Any = problem.loss(outputs, targets)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise InputError(f"the loss {problem.loss_name} must return a scalar tensor, got {_shape(loss)}")
    metric = MetricInfo() if are_class_targets(outputs, targets) else MetricInfo("loss", False, False, "batches")
    return metric, order


def _try_training(problem: Problem, model: nn.Module, batch: Any) -> None:
    """A training step of a copy, because a model may return something different in training."""
    inputs, targets = batch
    try:
        outputs = copy.deepcopy(model).train()(inputs)
    except ValueError:  # perhaps too few values per channel: each arm reports whether it can run
        return
    except Exception as error:  # from the user's code
        shape = tuple(inputs.shape)
        raise InputError(
            f"{problem.model_name}: the model raised in training, on inputs of shape {shape}: {one_line(error)}"
        ) from error
    with _raising_input_error(f"the loss {problem.loss_name} raised in training, on outputs {_shape(outputs)}:"):
        loss = problem.loss(outputs, targets)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise InputError(f"the loss {problem.loss_name} must return a scalar tensor in training, got {_shape(loss)}")
    with _raising_input_error(f"the backward of the loss {problem.loss_name} raised:"):
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped


def are_class_targets(outputs: Any, targets: Any) -> bool:
    """Whether ``targets`` are class indices for logits ``outputs``, so that accuracy is defined."""
    return (
        isinstance(outputs, Tensor)
        and isinstance(targets, Tensor)
        and targets.dtype == torch.int64
        and outputs.dim() >= 2
        and outputs.shape[1] > 1  # the argmax over a single logit means nothing
        and targets.shape == (outputs.shape[0], *outputs.shape[2:])
    )


def _num_groups(widths: list[int]) -> int:
    """The largest power of two up to `MAX_GROUPS` with at least two channels per group in every layer, else 1."""
    groups = MAX_GROUPS
    while groups > 1 and any(width % groups or width < 2 * groups for width in widths):
        groups //= 2
    return groups


@contextmanager
def _raising_input_error(prefix: str) -> Iterator[None]:
    """Turns an exception of the user's code into an `InputError` of one line."""
    try:
        yield
    except Exception as error:
        raise InputError(f"{prefix} {one_line(error)}") from error


def _type_name(value: Any) -> str:
    return "None" if value is None else type(value).__name__


def _shape(value: Any) -> str:
    if not isinstance(value, Tensor):
        return _type_name(value)
    return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
