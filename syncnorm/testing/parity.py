"""Checks a model that is synchronized and in DDP on several ranks against the same model in one process, in fp64.

Both train on the same batches with the same output gradients, and everything that training changes is compared.
"""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from syncnorm._torch_versions import ddp_without_buffers
from syncnorm.errors import InputError
from syncnorm.testing._rank import refuse_while_importing
from syncnorm.testing._transport import pickle_call
from syncnorm.testing.oracle import TOLERANCES
from syncnorm.testing.pool import run_ranks

__tracebackhide__ = True  # pytest shows the line of a user's test instead of this file's

_SEED = 0
# What is compared after a step, in the order in which an error spreads, so that the first difference is the closest
# to its cause: running statistics are updated in the forward, layer by layer.
_KINDS = ("buffer", "output", "input gradient", "parameter gradient", "parameter")

# kind -> name -> tensor, after a step
_Snapshot = dict[str, dict[str, Tensor]]


def assert_matches_single_process(
    build_model: Callable[[], nn.Module],
    inputs: Tensor | Sequence[Tensor],
    world_size: int = 2,
    steps: int = 1,
    *,
    splits: Sequence[int] | None = None,
    lr: float = 0.1,
    rtol: float | None = None,
    atol: float | None = None,
    timeout: float = 60,
    find_unused_parameters: bool = False,
) -> None:
    """Check that training on several ranks has the same result as training on the whole batch in one process.

    Each rank builds the model, converts it with ``syncnorm.convert``, wraps it in DistributedDataParallel (if it has
    trainable parameters) and makes ``steps`` SGD steps on its rows of each batch, on the CPU over gloo. The same
    model with plain batch norms makes them in this process, in fp64. The gradients of the output are random: with
    those of ``.sum().backward()`` the gradient of the input of a batch norm is zero and hides every error.
    Outputs, input gradients, parameters, their gradients and all buffers are compared on every rank after each step.

    Args:
        build_model: Function at the top level of a module that returns the model, with plain or synchronized batch
            norms and in training mode. Its forward must not be random (no dropout). Its output must be one tensor
            with a row for each row of the input.
        inputs: The whole batch, (N, ...), for every step; or a sequence of ``steps`` batches.
        world_size: Number of ranks.
        steps: Number of SGD steps. Rounding errors grow with each of them.
        splits: Number of rows of each rank, which may be uneven and may be 0. By default as even as possible.
        lr: Learning rate.
        rtol: Allowed error relative to each value; by default that of the dtype in
            :data:`syncnorm.testing.TOLERANCES`.
        atol: Allowed error relative to the largest value of the same kind; for a buffer, to its own largest value or
            to 1 if that is larger. By default likewise.
        timeout: Time limit for the ranks, in seconds.
        find_unused_parameters: As in DistributedDataParallel, for a model that does not use all of its parameters.

    Raises:
        AssertionError: Something differs. The message names the first difference: step, rank, layer, error.
        InputError: The arguments are invalid, or the output of the model cannot be split by rows.
        RankError: The model raised on a rank.

    Example:
        >>> import functools
        >>> model = functools.partial(nn.BatchNorm1d, 4)
        >>> assert_matches_single_process(model, torch.randn(6, 4), splits=[5, 1])
    """
    refuse_while_importing()  # before the training in this process, not after it
    if world_size < 1:
        raise InputError(f"world_size must be 1 or more, got {world_size}")
    pickle_call(build_model, ())  # before the training in this process, too
    batches = _batches(inputs, steps)
    rows = [_rows(batch, world_size, splits) for batch in batches]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        model = build_model()
    if not isinstance(model, nn.Module):
        raise InputError(f"build_model must return an nn.Module, got {type(model).__name__}")
    if any(is_lazy(tensor) for tensor in (*model.parameters(), *model.buffers())):
        raise InputError("the model has uninitialized lazy layers: run a forward in build_model")
    state = copy.deepcopy(model.state_dict())
    expected, cotangents = _single_process(model, batches, lr)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    unused = sorted(trained - expected[0]["parameter gradient"].keys())
    if unused and len(unused) < len(trained) and not find_unused_parameters:
        raise InputError(f"{', '.join(unused)} got no gradient: pass find_unused_parameters=True")
    arguments = (build_model, state, batches, cotangents, rows, lr, find_unused_parameters)
    ranks = run_ranks(_rank_train, world_size, arguments, timeout)
    differences = [
        difference
        for step in range(steps)
        for kind in _KINDS
        for difference in _differences(step, kind, expected[step], [r[step] for r in ranks], rows[step], rtol, atol)
    ]
    if differences:
        also = f"\n{len(differences) - 1} more differences, the next: {differences[1]}" if differences[1:] else ""
        raise AssertionError(f"{world_size} ranks do not match a single process: {differences[0]}{also}")


def _batches(inputs: Tensor | Sequence[Tensor], steps: int) -> list[Tensor]:
    if steps < 1:
        raise InputError(f"steps must be 1 or more, got {steps}")
    batches = [inputs] * steps if isinstance(inputs, Tensor) else list(inputs)
    for batch in batches:
        if not isinstance(batch, Tensor) or batch.dim() == 0 or len(batch) == 0:
            got = f"shape {tuple(batch.shape)}" if isinstance(batch, Tensor) else type(batch).__name__
            raise InputError(f"inputs must be tensors of one row or more, got {got}")
    if len(batches) != steps:
        raise InputError(f"got {len(batches)} batches for steps={steps}: give one per step, or one tensor for all")
    return [batch.detach() for batch in batches]


def _rows(batch: Tensor, world_size: int, splits: Sequence[int] | None) -> list[int]:
    if splits is None:
        each, left = divmod(len(batch), world_size)
        return [each + (rank < left) for rank in range(world_size)]
    whole = all(isinstance(count, int) for count in splits)
    if not whole or len(splits) != world_size or min(splits) < 0 or sum(splits) != len(batch):
        raise InputError(
            f"splits must have {world_size} row counts that add up to the batch of {len(batch)}, got {splits}"
        )
    return list(splits)


def _single_process(model: nn.Module, batches: list[Tensor], lr: float) -> tuple[list[_Snapshot], list[Tensor]]:
    from syncnorm.conversion.convert import revert

    model = revert(copy.deepcopy(model)).double()
    generator = torch.Generator().manual_seed(_SEED)
    steps, cotangents = [], []

    def cotangent(output: Tensor) -> Tensor:
        # Divided by the number of rows, as by a mean loss. Rounded to bfloat16, to be exact in every dtype.
        values = torch.randn(output.shape, generator=generator, dtype=torch.float64) / max(len(output), 1)
        cotangents.append(values.bfloat16().double())
        return cotangents[-1]

    for batch in batches:
        steps.append(_step(model, model, batch.double() if batch.is_floating_point() else batch, cotangent, lr))
    return steps, cotangents


def _rank_train(
    build_model: Callable[[], nn.Module],
    state: dict[str, Any],
    batches: list[Tensor],
    cotangents: list[Tensor],
    rows: list[list[int]],
    lr: float,
    find_unused_parameters: bool,
) -> list[_Snapshot]:
    from syncnorm.conversion.convert import convert

    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(_SEED)
    model = build_model()
    model.load_state_dict(state)
    model = convert(model)
    trains = any(parameter.requires_grad for parameter in model.parameters())
    # DDP must not broadcast the buffers, which are compared.
    wrapped = model
    if trains:
        wrapped = DistributedDataParallel(
            model, **ddp_without_buffers(), find_unused_parameters=find_unused_parameters
        )
    steps = []
    for batch, cotangent, counts in zip(batches, cotangents, rows, strict=True):
        mine = torch.split(cotangent, counts)[rank]
        # DDP averages gradients over the ranks; multiplied by the world size, the average is their sum.
        step = _step(wrapped, model, torch.split(batch, counts)[rank], partial(_cast, mine * world_size), lr)
        for gradient in step["input gradient"].values():
            gradient.div_(world_size)
        steps.append(step)
    return steps


def _cast(gradient: Tensor, output: Tensor) -> Tensor:
    return gradient.to(output.dtype)


def _step(
    wrapped: nn.Module, model: nn.Module, batch: Tensor, cotangent: Callable[[Tensor], Tensor], lr: float
) -> _Snapshot:
    """Makes one SGD step of ``model``, called through ``wrapped``; returns its outputs, gradients and new state."""
    x = batch.clone().requires_grad_(batch.is_floating_point())
    y = wrapped(x)
    if not isinstance(y, Tensor) or y.dim() == 0 or len(y) != len(x):
        got = f"shape {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
        raise InputError(
            f"the model's output must be one tensor with a row for each of the {len(x)} rows of its input, "
            f"got {got}: wrap the model in one that returns such a tensor."
        )
    model.zero_grad()
    gradient = cotangent(y)
    if y.requires_grad:
        torch.autograd.backward(y, gradient)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    if gradients:
        torch.optim.SGD(model.parameters(), lr).step()
    return {
        "buffer": {name: buffer.clone() for name, buffer in model.named_buffers()},
        "output": {"": y.detach()},
        "input gradient": {} if x.grad is None else {"": x.grad},
        "parameter gradient": gradients,
        "parameter": {name: p.detach().clone() for name, p in model.named_parameters()},
    }


def _differences(
    step: int,
    kind: str,
    expected: _Snapshot,
    ranks: list[_Snapshot],
    rows: list[int],
    rtol: float | None,
    atol: float | None,
) -> list[str]:
    """A description of every difference of a kind, by layer and rank."""
    wanted = expected[kind]
    # A gradient that is zero in exact arithmetic (of a bias before a batch norm) is rounding noise in fp32, as large
    # as the terms that cancel. So errors are relative to the largest value of the kind. Buffers differ in units.
    largest = max((_largest(value) for value in wanted.values()), default=0.0)
    found = []
    for name in dict.fromkeys([*wanted, *(name for rank in ranks for name in rank[kind])]):
        for rank, got in enumerate(ranks):
            where = f"step {step}, rank {rank}: {_describe(kind, name)}"
            if name not in wanted or name not in got[kind]:
                found.append(f"{where} exists only {'on the rank' if name in got[kind] else 'in the single process'}")
                continue
            want, have = wanted[name], got[kind][name]
            if kind in ("output", "input gradient"):
                want = torch.split(want, rows)[rank]
            scale = max(1.0, _largest(want)) if kind == "buffer" else largest
            table = TOLERANCES[max(_dtype(have), _dtype(got["output"][""]), key=lambda d: torch.finfo(d).eps)]
            tolerance = (table[0] if rtol is None else rtol, (table[1] if atol is None else atol) * scale)
            if problem := _compare(have, want, *tolerance):
                found.append(f"{where} {problem}")
    return found


def _compare(have: Tensor, want: Tensor, rtol: float, atol: float) -> str | None:
    if have.shape != want.shape:
        return f"has shape {tuple(have.shape)}, expected {tuple(want.shape)}"
    if not have.is_floating_point():
        rtol = atol = 0.0
    have, want = have.double(), want.double()
    error = (have - want).abs()
    wrong = ~((error <= atol + rtol * want.abs()) | (have == want) | (have.isnan() & want.isnan()))
    if not wrong.any():
        return None
    at = int(torch.where(wrong, error.nan_to_num(torch.inf, torch.inf), -1.0).argmax())
    return (
        f"differs, max abs error {float(error.flatten()[at]):.3g} ({float(have.flatten()[at]):.6g}, expected "
        f"{float(want.flatten()[at]):.6g}; rtol {rtol:g}, atol {atol:.2g}), in {int(wrong.sum())} of {wrong.numel()}"
    )


def _describe(kind: str, name: str) -> str:
    if not name:
        return kind
    layer, _, own = name.rpartition(".")
    what = own if kind in ("buffer", "parameter") else f"gradient of {own}"
    return f"{what} of layer {layer!r}" if layer else f"{what} of the model itself"


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def _dtype(x: Tensor) -> torch.dtype:
    return x.dtype if x.dtype in TOLERANCES else torch.float64
