"""Whether a model on several ranks is the model on one: your model, synced and in DDP, against itself in fp64.

Both train on the same batches with the same cotangents, and everything that training changes is compared.
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

from syncnorm.errors import InputError
from syncnorm.testing._transport import pickle_call
from syncnorm.testing.oracle import TOLERANCES
from syncnorm.testing.pool import run_ranks

_SEED = 0
# What a step leaves behind, in the order in which a fault spreads, so that the first difference is nearest to it:
# running statistics come from the forward, layer by layer.
_KINDS = ("buffer", "output", "input gradient", "parameter gradient", "parameter")

# kind -> name -> tensor
_Step = dict[str, dict[str, Tensor]]


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
    """Check that training on several ranks gives what training on the whole batch in one process gives.

    Each rank builds the model, converts it with ``syncnorm.convert``, wraps it in DistributedDataParallel (if
    anything in it trains) and makes ``steps`` SGD steps on its rows of each batch, on the CPU over gloo. The same
    model with plain batch norms makes them in this process, in fp64. The gradients that start the backward are
    random: with ``.sum().backward()`` a batch norm passes on zeros, and any backward looks right.
    Outputs, input gradients, parameters, their gradients and all buffers are compared on every rank after each
    step.

    Args:
        build_model: Function at the top level of a module; returns the model with plain or synced batch norms, in
            training mode. It must draw nothing at random in its forward (no dropout). Its output is one tensor with
            a row for each row of the input.
        inputs: The whole batch, (N, ...), for every step; or a sequence of ``steps`` batches.
        world_size: Number of ranks.
        steps: Number of SGD steps. Rounding grows with each of them.
        splits: Rows of each rank; may be uneven, may contain 0. By default as even as possible.
        lr: Learning rate.
        rtol: Allowed error relative to each value; by default that of the dtype in
            :data:`syncnorm.testing.TOLERANCES`.
        atol: Allowed error relative to the largest value of the same kind (to 1 for buffers), by default likewise.
        timeout: Seconds for the ranks.
        find_unused_parameters: As in DistributedDataParallel, for a model that leaves parameters out.

    Raises:
        AssertionError: Something differs. The message names the first difference: step, rank, layer, error.
        InputError: Arguments that no rank could use, or a model whose output cannot be split by rows.
        RankError: The model raised on a rank.

    Example:
        >>> import functools
        >>> model = functools.partial(nn.BatchNorm1d, 4)
        >>> assert_matches_single_process(model, torch.randn(6, 4), splits=[5, 1])
    """
    if world_size < 1:
        raise InputError(f"world_size has to be 1 or more, got {world_size}")
    pickle_call(build_model, ())  # before the training here, rather than after it
    batches = _batches(inputs, steps)
    rows = [_rows(batch, world_size, splits) for batch in batches]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        model = build_model()
    if not isinstance(model, nn.Module):
        raise InputError(f"build_model has to return an nn.Module, got {type(model).__name__}")
    if any(is_lazy(tensor) for tensor in (*model.parameters(), *model.buffers())):
        raise InputError("the model has lazy layers that have not seen an input: give them one in build_model")
    state = copy.deepcopy(model.state_dict())
    expected, cotangents = _single_process(model, batches, lr)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    unused = sorted(trained - expected[0]["parameter gradient"].keys())
    if unused and len(unused) < len(trained) and not find_unused_parameters:
        raise InputError(f"{', '.join(unused)} got no gradient: DDP needs find_unused_parameters=True for that")
    arguments = (build_model, state, batches, cotangents, rows, lr, find_unused_parameters)
    ranks = run_ranks(_train_rank, world_size, arguments, timeout)
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
        raise InputError(f"steps has to be 1 or more, got {steps}")
    batches = [inputs] * steps if isinstance(inputs, Tensor) else list(inputs)
    for batch in batches:
        if not isinstance(batch, Tensor) or batch.dim() == 0 or len(batch) == 0:
            got = f"shape {tuple(batch.shape)}" if isinstance(batch, Tensor) else type(batch).__name__
            raise InputError(f"inputs has to be tensors of one row or more, got {got}")
    if len(batches) != steps:
        raise InputError(f"got {len(batches)} batches for steps={steps}: give one for each step, or a tensor for all")
    return [batch.detach() for batch in batches]


def _rows(batch: Tensor, world_size: int, splits: Sequence[int] | None) -> list[int]:
    if splits is None:
        each, left = divmod(len(batch), world_size)
        return [each + (rank < left) for rank in range(world_size)]
    whole = all(isinstance(count, int) for count in splits)
    if not whole or len(splits) != world_size or min(splits) < 0 or sum(splits) != len(batch):
        raise InputError(
            f"splits has to hold {world_size} row counts that add up to the batch of {len(batch)}, got {splits}"
        )
    return list(splits)


def _single_process(model: nn.Module, batches: list[Tensor], lr: float) -> tuple[list[_Step], list[Tensor]]:
    from syncnorm.conversion.convert import revert

    model = revert(copy.deepcopy(model)).double()
    generator = torch.Generator().manual_seed(_SEED)
    steps, cotangents = [], []

    def cotangent(output: Tensor) -> Tensor:
        # Divided by the rows, as a mean loss does. Multiples of bfloat16, so that every rank's dtype holds them.
        values = torch.randn(output.shape, generator=generator, dtype=torch.float64) / max(len(output), 1)
        cotangents.append(values.bfloat16().double())
        return cotangents[-1]

    for batch in batches:
        steps.append(_step(model, model, batch.double() if batch.is_floating_point() else batch, cotangent, lr))
    return steps, cotangents


def _train_rank(
    build_model: Callable[[], nn.Module],
    state: dict[str, Any],
    batches: list[Tensor],
    cotangents: list[Tensor],
    rows: list[list[int]],
    lr: float,
    find_unused_parameters: bool,
) -> list[_Step]:
    from syncnorm.conversion.convert import convert

    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(_SEED)
    model = build_model()
    model.load_state_dict(state)
    model = convert(model)
    trains = any(parameter.requires_grad for parameter in model.parameters())
    # Buffers are compared, so DDP should not make them equal.
    wrapped = model
    if trains:
        wrapped = DistributedDataParallel(
            model, forward_sync_buffers=False, find_unused_parameters=find_unused_parameters
        )
    steps = []
    for batch, cotangent, counts in zip(batches, cotangents, rows, strict=True):
        mine = torch.split(cotangent, counts)[rank]
        # DDP averages parameter gradients over the ranks: scaled, that average is the sum, the whole batch's.
        step = _step(wrapped, model, torch.split(batch, counts)[rank], partial(_cast, mine * world_size), lr)
        for gradient in step["input gradient"].values():
            gradient.div_(world_size)
        steps.append(step)
    return steps


def _cast(gradient: Tensor, output: Tensor) -> Tensor:
    return gradient.to(output.dtype)


def _step(
    wrapped: nn.Module, model: nn.Module, batch: Tensor, cotangent: Callable[[Tensor], Tensor], lr: float
) -> _Step:
    """One SGD step of ``model``, called through ``wrapped``; what it gave and what it left behind."""
    x = batch.clone().requires_grad_(batch.is_floating_point())
    y = wrapped(x)
    if not isinstance(y, Tensor) or y.dim() == 0 or len(y) != len(x):
        got = f"shape {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
        raise InputError(
            f"the model's output has to be one tensor with a row for each of the {len(x)} rows of its input, got "
            f"{got}: wrap the model in one that returns such a tensor."
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
    step: int, kind: str, expected: _Step, ranks: list[_Step], rows: list[int], rtol: float | None, atol: float | None
) -> list[str]:
    """Every difference of a kind, described, layer by layer and rank by rank."""
    wanted = expected[kind]
    # A gradient that is zero in exact arithmetic (a bias before a batch norm) is rounding noise in fp32, as large as
    # what cancels: the scale is that of its kind, not its own. Buffers have units of their own.
    largest = max((_largest(value) for value in wanted.values()), default=0.0)
    found = []
    for name in dict.fromkeys([*wanted, *(name for rank in ranks for name in rank[kind])]):
        for rank, got in enumerate(ranks):
            where = f"step {step}, rank {rank}: {_told(kind, name)}"
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


def _told(kind: str, name: str) -> str:
    if not name:
        return kind
    layer, _, own = name.rpartition(".")
    what = own if kind in ("buffer", "parameter") else f"gradient of {own}"
    return f"{what} of layer {layer!r}" if layer else f"{what} of the model itself"


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def _dtype(x: Tensor) -> torch.dtype:
    return x.dtype if x.dtype in TOLERANCES else torch.float64
