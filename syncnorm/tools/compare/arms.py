"""The arms of a comparison: how each converts the model's norms, and how it distributes the batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import partial
from typing import Any, Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncnorm.conversion.convert import convert
from syncnorm.errors import InputError
from syncnorm.modules import Synced
from syncnorm.tools.common.loading import load


@dataclass(frozen=True)
class Arm:
    """One row of the comparison.

    Attributes:
        name: as in ``--arms``.
        about: one line of description.
        parallelism: ``"single"``: rank 0 alone, with the global batch. ``"dp"``: rank 0 alone, DataParallel.
            ``"ddp"``: all ranks, each with its slice of the batch, DistributedDataParallel.
        convert_norms: (model, num_groups) -> the model with this arm's norm layers.
        synced: its norm layers communicate.
        torch_may_refuse: a ``ValueError`` during the setup of the arm means that torch does not support it here.
        recalibrated: the running statistics are recomputed from training batches before each test.
        group_size: number of ranks that a synced layer combines; ``None`` for all.
        micro_batches: number of micro-batches that each rank splits its batch into.
        in_step: they run layer by layer in step, as one batch (`syncnorm.training.whole_batch`); otherwise one after
            another, and their gradients are accumulated.
        of_user: the user's function edits the model.
    """

    name: str
    about: str
    parallelism: Literal["single", "dp", "ddp"]
    convert_norms: Callable[[nn.Module, int], nn.Module]
    synced: bool = False
    torch_may_refuse: bool = False
    recalibrated: bool = False
    group_size: int | None = None
    micro_batches: int = 1
    in_step: bool = False
    of_user: bool = False

    @property
    def micro_batches_in_turn(self) -> int:
        """Number of micro-batches whose gradients are accumulated."""
        return 1 if self.in_step else self.micro_batches


def _unchanged(model: nn.Module, num_groups: int) -> nn.Module:
    return model


def _torch_synced(model: nn.Module, num_groups: int) -> nn.Module:
    convert_sync_batchnorm: Callable[[nn.Module], nn.Module] = nn.SyncBatchNorm.convert_sync_batchnorm
    return convert_sync_batchnorm(model)


def _frozen(model: nn.Module, num_groups: int) -> nn.Module:
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            # The training loop calls model.train() before each step.
            module.register_forward_pre_hook(_to_eval_mode)
    return model


def _to_eval_mode(module: nn.Module, args: Any) -> None:
    module.training = False


SINGLE = Arm("single", "one process with the global batch: the reference", "single", _unchanged)
_SYNCED = Arm("ddp+syncbn", "DDP after syncnorm.convert(model)", "ddp", lambda model, _: convert(model), synced=True)


def _in_groups(size: int) -> Arm:
    return replace(
        _SYNCED,
        about=f"DDP after syncnorm.convert(model, group_size={size})",
        convert_norms=lambda model, _: convert(model, group_size=size),
        group_size=size,
    )


def _accumulate_local(number: int) -> Arm:
    about = f"DDP with local BN; gradients of {number} micro-batches, each with its own statistics"
    return Arm("accumulate-bn", about, "ddp", _unchanged, micro_batches=number)


def _accumulate(number: int) -> Arm:
    return Arm(
        "accumulate",
        f"DDP after convert(model, accumulate={number}): each micro-batch has the statistics of those so far",
        "ddp",
        lambda model, _: convert(model, accumulate=number),
        synced=True,
        micro_batches=number,
    )


def _accumulate_exactly(number: int) -> Arm:
    about = f"ddp+syncbn with whole_batch(model, micro_batches={number}): the statistics of all micro-batches"
    return replace(_SYNCED, name="accumulate-exact", about=about, micro_batches=number, in_step=number > 1)


# Name -> the arm for a number N after a colon, and what N is.
_NUMBERED: dict[str, tuple[Callable[[int], Arm], str]] = {
    _SYNCED.name: (_in_groups, "ranks in a group"),
    "accumulate-bn": (_accumulate_local, "micro-batches"),
    "accumulate": (_accumulate, "micro-batches"),
    "accumulate-exact": (_accumulate_exactly, "micro-batches"),
}
# Micro-batches of an arm that is named without a number.
DEFAULT_MICRO_BATCHES = 2

# Those that run by default.
ARMS = {
    arm.name: arm
    for arm in (
        SINGLE,
        Arm("dp", "DataParallel with the statistics of each replica's slice", "dp", _unchanged),
        Arm("ddp", "DDP with the statistics of each rank's slice", "ddp", _unchanged),
        _SYNCED,
        Arm(
            "ddp+group",
            'DDP after convert(model, to="group")',
            "ddp",
            lambda model, num_groups: convert(model, to="group", num_groups=num_groups),
        ),
        Arm(
            "ddp+layer",
            'DDP after convert(model, to="layer")',
            "ddp",
            lambda model, _: convert(model, to="layer"),
        ),
        Arm(
            "ddp+instance",
            'DDP after convert(model, to="instance")',
            "ddp",
            lambda model, _: convert(model, to="instance"),
        ),
        Arm("ddp+torch-syncbn", "DDP with torch.nn.SyncBatchNorm", "ddp", _torch_synced, True, torch_may_refuse=True),
    )
}

# Enough to decide whether SyncBN is needed.
DEFAULT_ARMS = ("single", "dp", "ddp", "ddp+syncbn")
MORE_ARMS = {
    arm.name: arm
    for arm in (
        Arm(
            "ddp+recalibrated",
            "local BN, with statistics of training batches of all ranks (syncnorm.training.recalibrate) in tests",
            "ddp",
            _unchanged,
            recalibrated=True,
        ),
        Arm("ddp+frozen", "BN with its initial running statistics: for pretrained weights", "ddp", _frozen),
        *(make(DEFAULT_MICRO_BATCHES) for make in (_accumulate_local, _accumulate, _accumulate_exactly)),
    )
}


def arm_named(name: str) -> Arm:
    """The arm called ``name``: one of `ARMS` or `MORE_ARMS`, or one with a number.

    ``ddp+syncbn:8`` is the arm with groups of 8 ranks, ``accumulate:4`` the one with 4 micro-batches.
    ``module:function`` is an arm too: it edits the model, with its batch norms, in place or returns another.

    Raises:
        InputError: there is no such arm.
    """
    known = {**ARMS, **MORE_ARMS}
    if name in known:
        return known[name]
    base, colon, rest = name.partition(":")
    if colon and base in _NUMBERED:
        make, what = _NUMBERED[base]
        if not rest.isdecimal() or int(rest) < 1:
            raise InputError(f"arm {name!r}: expected the number of {what}, such as {base}:8")
        return replace(make(int(rest)), name=name)
    if colon and base.replace(".", "").isidentifier():
        edit = partial(_edit, load(name, "--arms"), name)
        return Arm(name, "DDP after a function of the user", "ddp", edit, of_user=True)
    close = get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}? " if close else ""
    names = ", ".join((*known, *(f"{numbered}:N" for numbered in _NUMBERED)))
    raise InputError(f"no arm is called {name!r}: {hint}the arms are {names}, and module:function")


def _edit(edit: Callable[[nn.Module], Any], name: str, model: nn.Module, num_groups: int) -> nn.Module:
    edited = edit(model)
    if edited is None:
        return model
    if not isinstance(edited, nn.Module):
        raise InputError(f"arm {name}: expected a model, or None after an edit in place, got {type(edited).__name__}")
    return edited


def communicates(arm: Arm, model: nn.Module) -> bool:
    """Whether a forward of ``model`` in training exchanges statistics with other ranks."""
    return arm.synced or any(isinstance(m, Synced | nn.SyncBatchNorm) for m in model.modules())
