"""Batch norms folded into the convolution or linear layer before them, for inference."""

import copy
import warnings
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from syncnorm.conversion.classes import has_own_forward
from syncnorm.conversion.convert import revert
from syncnorm.errors import InputError
from syncnorm.layer.checks import shape

M = TypeVar("M", bound=nn.Module)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# By exact type: what a subclass or a parametrization adds to the weight would be lost.
_FOLDABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)


def fold(model: M) -> M:
    """A copy of ``model`` for inference: batch norms are folded into the convolution or linear layer before them.

    In evaluation a batch norm is an affine map of each channel, and so part of the weight and bias before it. The
    copy is in evaluation mode, its synced layers are plain ones, folded norms are ``nn.Identity``. Outputs
    differ by rounding. Not to be trained.

    Pairs are found in a ``torch.fx`` trace of the model: the norm alone uses the output, and both run once. A model
    that cannot be traced has only those folded that are neighbours in an ``nn.Sequential``. Left as they are: norms
    without running statistics, with a forward of their own (an activation in it) or with hooks;
    transposed convolutions of several groups; convolutions and linear layers with parametrizations or hooks.

    A batch norm takes channels from dimension 1, a linear layer puts them last: a folded linear layer
    therefore refuses input of more than 2 dimensions.

    Args:
        model: left unchanged; may be synced, in any mode.

    Returns:
        A model of the same class.

    Warns:
        UserWarning: the model could not be traced.

    Collective: none.

    Example:
        >>> fold(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()))
        Sequential(
          (0): Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
          (1): Identity()
          (2): ReLU()
        )
    """
    folded = revert(copy.deepcopy(model)).eval()
    try:
        graph = _Tracer().trace(folded)
    except Exception as error:  # whatever the model's own code makes of fx's proxies
        warnings.warn(
            f"syncnorm.fold could not trace {type(model).__name__} with torch.fx ({error}), and folds only batch "
            f"norms that directly follow their layer in an nn.Sequential",
            stacklevel=2,
        )
        pairs = list(_neighbours(folded))
    else:
        pairs = list(_traced(folded, graph))
    replaced: dict[nn.Module, nn.Module] = {}
    for layer, norm in pairs:
        if _can_fold(layer, norm):
            replaced |= {layer: _fused(layer, norm), norm: nn.Identity().eval()}
    for parent in list(folded.modules()):
        for name, child in parent._modules.items():
            if child in replaced:
                parent._modules[name] = replaced[child]
    return folded


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """A batch norm is one step, whoever wrote it."""
        return isinstance(m, _BatchNorm) or super().is_leaf_module(m, module_qualified_name)


def _traced(model: nn.Module, graph: fx.Graph) -> Iterator[tuple[nn.Module, nn.Module]]:
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    # A weight that is used besides its layer would change under the other use.
    used = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    for node in graph.nodes:
        before = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) > 1:
            continue
        names = {str(before.target), str(node.target)}
        if calls[before.target] == calls[node.target] == 1 and not names & used:
            yield model.get_submodule(str(before.target)), model.get_submodule(str(node.target))


def _neighbours(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    places = Counter(m for _, m in model.named_modules(remove_duplicate=False))
    for module in model.modules():
        if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
            yield from (pair for pair in pairwise(module) if places[pair[0]] == places[pair[1]] == 1)


def _can_fold(layer: nn.Module, norm: nn.Module) -> bool:
    if type(layer) not in _FOLDABLE or not isinstance(norm, _BatchNorm) or has_own_forward(type(norm)):
        return False
    if any(vars(m).get(kind) for m in (layer, norm) for kind in ("_forward_hooks", "_forward_pre_hooks", "forward")):
        return False
    # In a transposed convolution these are the channels of one group: of several, none of them folds.
    channels = layer.weight.size(1 if isinstance(layer, _TRANSPOSED) else 0)  # type: ignore[operator]
    return norm.track_running_stats and norm.running_mean is not None and norm.running_mean.numel() == channels


def _fused(layer: Any, norm: Any) -> nn.Module:
    if norm.weight is None:  # torch's linear fusion expects one
        norm.weight = nn.Parameter(torch.ones_like(norm.running_mean))
    if norm.bias is None:
        norm.bias = nn.Parameter(torch.zeros_like(norm.running_mean))
    if not isinstance(layer, nn.Linear):
        convolution: nn.Module = fuse_conv_bn_eval(layer, norm, transpose=isinstance(layer, _TRANSPOSED))
        return convolution
    fused = fuse_linear_bn_eval(layer, norm)
    fused.register_forward_pre_hook(_check_rows)
    return fused


def _check_rows(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
    if args[0].dim() > 2:
        raise InputError(
            f"this linear layer holds the batch norm that was after it, which it can for input (batch, features) "
            f"alone; got {shape(args[0])}"
        )
