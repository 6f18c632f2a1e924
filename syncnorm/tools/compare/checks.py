"""Tries a problem in this process before anything is started, so that what does not fit is said in one line."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import UninitializedParameter
from torch.utils.data import IterableDataset

from syncnorm.conversion.convert import convert
from syncnorm.errors import InputError
from syncnorm.tools.common.data import Batches, digits
from syncnorm.tools.common.errors import missing_extra, one_line
from syncnorm.tools.compare.arms import arm_named
from syncnorm.tools.compare.evaluation import autocast
from syncnorm.tools.compare.metrics import LOSS, Metric, Tally, num_required, remembered
from syncnorm.tools.compare.named_metrics import ACCURACY
from syncnorm.tools.compare.problem import Problem
from syncnorm.tools.compare.records import CompareSettings, Task
from syncnorm.tools.compare.steps import list_of

# Wu and He (2018) use 32 groups; a narrower model has fewer.
MAX_GROUPS = 32
# Of test data, for a trial of the metric.
TRIAL_SAMPLES = 2


def check_problem(problem: Problem, settings: CompareSettings) -> tuple[Problem, Task, int]:
    """Runs model, data, step and metric once in this process.

    Returns:
        The problem with what the trial found out about it, a description of it, and the number of groups that group
        norm can have in every layer.

    Raises:
        InputError: a function raises, or returns something that cannot be compared.
    """
    model = _checked_model(problem, settings.seeds[0])
    _check_arms(problem, settings)
    _check_optimizer(problem, model, settings)
    train, test = _checked_datasets(problem)
    if len(train) < settings.global_batch:
        raise InputError(
            f"{settings.world_size} ranks with {settings.batch_per_rank} samples each make a global batch of "
            f"{settings.global_batch}, more than the {len(train)} training samples of {problem.data_name}: use a "
            f"smaller --batch-per-rank"
        )
    names = f"the training data of {problem.data_name}", f"the test data of {problem.data_name}"
    batch = _checked_batch(problem, train, settings.global_batch, names[0])
    test_batch = _checked_batch(problem, test, min(TRIAL_SAMPLES, len(test)), names[1])
    if settings.num_workers:
        _try_workers(problem, train, settings, names[0])
    norms = {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm)}
    if problem.step is None:
        with _order_of_calls(norms) as order:
            outputs = _try_model(problem, model, test_batch)
        problem = replace(problem, metric=problem.metric or _default_metric(outputs, test_batch[1]))
        problem = _try_training(problem, model, batch, settings)
    else:
        with _order_of_calls(norms) as order:
            problem = _try_training(problem, model, batch, settings)
        problem = _try_loss_in_eval_mode(problem, model, test_batch)
    assert problem.metric is not None
    if not problem.metric.is_loss:
        _try_metric(problem.metric, model, test_batch, min(TRIAL_SAMPLES, len(test)), settings)
    task = Task(
        model=problem.model_name,
        data=problem.data_name,
        loss=problem.loss_name,
        metric=problem.metric.info,
        num_parameters=sum(p.numel() for p in model.parameters()),
        norm_layers=tuple(dict.fromkeys((*order, *norms))),
        num_train=len(train),
        num_test=len(test),
        step=problem.step_name,
        collate=problem.collate_name,
        optimizer=problem.optimizer_name,
    )
    return problem, task, _num_groups([m.num_features for m in norms.values()])


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


def _check_arms(problem: Problem, settings: CompareSettings) -> None:
    for name in settings.arms:
        arm = arm_named(name)
        if arm.group_size and settings.world_size % arm.group_size:
            raise InputError(
                f"arm {name}: {settings.world_size} ranks cannot be divided into groups of {arm.group_size}"
            )
        if arm.micro_batches > settings.batch_per_rank:
            raise InputError(
                f"arm {name}: {settings.batch_per_rank} samples per rank cannot be split into {arm.micro_batches} "
                f"micro-batches: use fewer, or a larger --batch-per-rank"
            )
        if arm.micro_batches > 1 and settings.accumulate > 1:
            raise InputError(f"arm {name} splits the batch of each step itself: leave out --accumulate")
        if arm.of_user:
            with _raising_input_error(f"arm {name} raised"):
                arm.convert_norms(problem.model(settings.seeds[0]), 1)


def _check_optimizer(problem: Problem, model: nn.Module, settings: CompareSettings) -> None:
    with _raising_input_error(f"the optimizer function {problem.optimizer_name} raised"):
        optimizers = problem.optimizers(model, settings)
    parameters = {id(parameter) for parameter in model.parameters()}
    for each in list_of(optimizers, problem.optimizer_name):
        if not parameters & {id(parameter) for group in each.param_groups for parameter in group["params"]}:
            raise InputError(
                f"the optimizer function {problem.optimizer_name} returned an optimizer without any parameter of the "
                f"model that it was called with"
            )
        if num_required(each.step) and not problem.trains_by_itself:
            raise InputError(
                f"{type(each).__name__}.step needs a closure: call it in a --step with a third parameter, optimizers"
            )
    if not problem.trains_by_itself:
        return
    if settings.accumulate > 1:
        raise InputError(f"the step {problem.step_name} trains by itself: leave out --accumulate")
    if settings.amp == "float16":
        raise InputError(f"the step {problem.step_name} trains by itself, without loss scaling: use --amp bfloat16")


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


def _checked_batch(problem: Problem, data: Any, size: int, name: str) -> Any:
    with _raising_input_error(f"{name}: item 0 raised"):
        item = data[0]
    is_pair = isinstance(item, tuple | list) and len(item) == 2
    if problem.step is None and problem.collate_name == "" and not is_pair:
        got = f"{len(item)} values" if isinstance(item, tuple | list) else _type_name(item)
        raise InputError(
            f"{name}: items must be (input, target), got {got}: say how to train on them with --step, or make "
            f"(input, target) batches of them with --collate"
        )
    with _raising_input_error(f"{name}: an item raised"):
        items = [data[i] for i in range(size)]
    by_default = "" if problem.collate_name else " (write a function of a list of items, and pass it with --collate)"
    with _raising_input_error(f"{name}: items cannot be collated into a batch{by_default}:"):
        batch = problem.collate(items)
    if problem.step is not None:
        return batch
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise InputError(
            f"{name}: batches must be (inputs, targets), got {_type_name(batch)} from {problem.collate_name}: say "
            f"how to train on them with --step"
        )
    if not isinstance(batch[0], Tensor) and problem.collate_name == "":
        raise InputError(
            f"{name}: the input of an item must be a tensor, got {_type_name(item[0])}: say how to train on it with "
            f"--step"
        )
    return batch


def _try_workers(problem: Problem, train: Any, settings: CompareSettings, name: str) -> None:
    part = slice(0, settings.batch_per_rank)
    try:
        Batches(train, settings.global_batch, part, settings.seeds[0], problem.collate, settings.num_workers).next()
    except Exception as error:  # of a worker, with its traceback; or the data set does not pickle
        *_, last = str(error).strip().splitlines() or [""]
        why = last if last.startswith(type(error).__name__) else f"{type(error).__name__}: {last}"
        raise InputError(f"{name}: cannot be loaded with --num-workers {settings.num_workers}: {why}") from error


@contextmanager
def _order_of_calls(norms: dict[str, Any]) -> Iterator[list[str]]:
    """The names of ``norms`` in the order in which the block calls them."""
    order: list[str] = []
    hooks = [m.register_forward_pre_hook(_Note(order, name)) for name, m in norms.items()]
    try:
        yield order
    finally:
        for hook in hooks:
            hook.remove()


class _Note:
    """A hook that also works in a copy of the model."""

    def __init__(self, order: list[str], name: str) -> None:
        self._order, self._name = order, name

    def __deepcopy__(self, memo: Any) -> _Note:
        return self

    def __call__(self, *_: Any) -> None:
        self._order.append(self._name)


@torch.no_grad()
def _try_model(problem: Problem, model: nn.Module, batch: Any) -> Any:
    """The outputs of the model in eval mode, for which there is a loss."""
    inputs, targets = batch
    of_shape = f" of shape {tuple(inputs.shape)}" if isinstance(inputs, Tensor) else f": {_type_name(inputs)}"
    with _raising_input_error(f"{problem.model_name}: the model raised on inputs{of_shape}:"):
        outputs = model.eval()(inputs)
    if problem.loss is F.cross_entropy:
        if not (isinstance(targets, Tensor) and isinstance(outputs, Tensor)):
            raise InputError(
                f"cross-entropy needs outputs and targets that are tensors, got {_type_name(outputs)} and "
                f"{_type_name(targets)}: pass a loss with --loss module:function, or a step with --step"
            )
        if targets.dtype != torch.int64:
            raise InputError(
                f"cross-entropy needs targets that are int64 class indices, got {_shape(targets)}: pass a loss with "
                f"--loss module:function"
            )
    arguments = f"outputs {_shape(outputs)} and targets {_shape(targets)}"
    with _raising_input_error(f"the loss {problem.loss_name} raised on {arguments}:"):
        loss: Any = problem.loss(outputs, targets)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise InputError(f"the loss {problem.loss_name} must return a scalar tensor, got {_shape(loss)}")
    return outputs


def _default_metric(outputs: Any, targets: Any) -> Metric:
    return ACCURACY if are_class_targets(outputs, targets) else LOSS


def _try_training(problem: Problem, model: nn.Module, batch: Any, settings: CompareSettings) -> Problem:
    """A training step of a copy, which shows whether parameters stay without a gradient."""
    try:
        with autocast(settings.amp, torch.device("cpu")):
            trained = problem.try_step(model, batch, settings)
    except Exception as error:  # from the user's code
        if isinstance(error, ValueError) and "more than 1 value per channel" in str(error):
            return problem  # each arm reports whether it can run
        with autocast(settings.amp, torch.device("cpu")):
            raise _training_error(problem, model, batch, error) from error
    unused = any(p.requires_grad and p.grad is None for p in trained.parameters())
    return replace(problem, unused_parameters=unused)


def _training_error(problem: Problem, model: nn.Module, batch: Any, error: Exception) -> InputError:
    """What raised: the step; or the model, the loss, or its backward, which are tried one after another."""
    if problem.step is not None:
        if isinstance(error, InputError):
            return error
        return InputError(f"the step {problem.step_name} raised in training: {one_line(error)}")
    inputs, targets = batch
    what = f"{problem.model_name}: the model raised in training, on inputs {_shape(inputs)}"
    try:
        outputs = copy.deepcopy(model).train()(inputs)
        what = f"the loss {problem.loss_name} raised in training, on outputs {_shape(outputs)}"
        loss = problem.loss(outputs, targets)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            what = f"the loss {problem.loss_name} must return a scalar tensor in training"
            return InputError(f"{what}, got {_shape(loss)}")
    except Exception as again:  # the same error, now with what raised it
        return InputError(f"{what}: {one_line(again)}")
    return InputError(f"the backward of the loss {problem.loss_name} raised: {one_line(error)}")


@torch.no_grad()
def _try_loss_in_eval_mode(problem: Problem, model: nn.Module, batch: Any) -> Problem:
    """Whether a step has a loss in tests; without one it needs a metric."""
    reason = "it trains by itself"
    if not problem.trains_by_itself:
        try:
            problem.loss_of(model.eval(), batch)
            return replace(problem, metric=problem.metric or LOSS)
        except Exception as error:  # many detectors have no loss in eval mode
            reason = f"in eval mode, {error if isinstance(error, InputError) else one_line(error)}"
    if problem.metric is None or problem.metric.is_loss:
        raise InputError(
            f"the step {problem.step_name} gives no loss in tests ({reason}): pass a metric with --metric"
        )
    return replace(problem, has_test_loss=False)


@torch.no_grad()
def _try_metric(metric: Metric, model: nn.Module, batch: Any, size: int, settings: CompareSettings) -> None:
    model.eval()
    name = f"the metric {metric.name}"
    try:
        tally = metric.tally(1, with_units=True)
        with remembered(model), autocast(settings.amp, torch.device("cpu")):
            tally.update(model, batch)
        _check_result(metric, tally, name, size)
    except InputError as error:
        raise InputError(f"{name}: {error}") if not str(error).startswith(name) else error from error
    except Exception as error:  # from the user's code
        raise InputError(f"{name} {missing_extra(error) or f'raised {one_line(error)}'}") from error


def _check_result(metric: Metric, tally: Tally, name: str, size: int) -> None:
    if metric.accumulates:
        tally.result()  # of so few samples it may not be finite
        tally.units()
        return
    values = tally.units()
    if len(values) != size:
        raise InputError(f"{name} returned {len(values)} values for {size} samples: expected one for each sample")
    wrong = next((v for v in values if not (0 <= v <= 1 if metric.share else abs(v) < float("inf"))), None)
    if wrong is not None:
        expected = "between 0 and 1, as share says" if metric.share else "finite values"
        raise InputError(f"{name} returned {wrong:g}: expected {expected}")


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
    except InputError:  # ours, which says it already
        raise
    except Exception as error:  # from the user's code
        raise InputError(f"{prefix} {one_line(error)}") from error


def _type_name(value: Any) -> str:
    return "None" if value is None else type(value).__name__


def _shape(value: Any) -> str:
    if not isinstance(value, Tensor):
        return _type_name(value)
    return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
