"""Forwards that all ranks make together, though some have fewer batches than others."""

from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from syncnorm.comm.gather import gather_objects
from syncnorm.errors import InputError, SyncNormError

Inputs = Tensor | dict[str, Any]


def in_step(own: Iterator[Any], world: dist.ProcessGroup | None, device: torch.device) -> Iterator[Inputs]:
    """Inputs until no rank has one left; empty ones where only others have.

    Args:
        own: items of this rank: inputs, or tuples or lists that begin with them; inputs are a tensor or a dict.
        world: the ranks that step together; None is this process alone.
        device: for the empty inputs of a rank that never had one.

    Raises:
        InputError: no rank has an item, or this rank's is of another kind.
        SyncNormError: another rank's ``own`` raised; where it did, that error goes on.

    Collective: all ranks of ``world``, before each step and after the last: one all_gather_object.
    """
    empty: Inputs = {}
    for step in count():
        inputs, error = _fetch(own)
        state = "end" if inputs is None else "batch"
        states = gather_objects(state if error is None else f"{type(error).__name__}: {error}", world, "recalibrate")
        if error is not None:
            raise error
        failed = [rank for rank, text in enumerate(states) if text not in ("batch", "end")]
        if failed:
            raise SyncNormError(f"recalibrate: the batches of rank {failed[0]} raised {states[failed[0]]}")
        if "batch" not in states:
            break
        if step == 0 and world is not None:
            empty = {} if inputs is None else _map(inputs, lambda x: x[:0].clone())
            if "end" in states:
                empties = gather_objects(_map(empty, Tensor.cpu), world, "recalibrate")
                empty = _map(empties[states.index("batch")], lambda x: x.to(device))
        yield empty if inputs is None else inputs
    if step == 0:
        raise InputError("recalibrate needs batches, and no rank has one")


def _fetch(own: Iterator[Any]) -> tuple[Inputs | None, Exception | None]:
    """The next inputs, None at the end; or what came up instead."""
    try:
        item = next(own, None)
        inputs = item[0] if isinstance(item, tuple | list) else item
        if not isinstance(inputs, Tensor | dict | None):
            raise InputError(f"recalibrate takes tensors or dicts of them as inputs, got {type(inputs).__name__}")
    except Exception as error:
        return None, error
    return inputs, None


def _map(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    if isinstance(inputs, Tensor):
        return change(inputs)
    return {k: change(v) if isinstance(v, Tensor) and v.dim() > 0 else v for k, v in inputs.items()}
